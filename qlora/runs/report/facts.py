"""Manifest and metrics of a run as named values: the rows of the report's tables, one column per run."""

from collections.abc import Callable, Mapping
from typing import Any

from qlora.runs.report import number_format
from qlora.runs.report.compared_answers import held_out_answers
from qlora.runs.report.quantities import Duration, Energy, Size, Value
from qlora.runs.report.run_data import RunData, number, section, string
from qlora.runs.report.series import Point, points

Facts = dict[str, Value]  # name -> value with its unit


def held_out_losses(run: RunData) -> list[Point]:
    """(step, held-out loss) of every evaluation; without metrics, the first and the last one of the manifest."""
    losses = points(run.metrics, "eval", "eval_loss")
    if losses:
        return losses
    before, after = number(run.manifest, "result", "eval_loss_before"), number(run.manifest, "result", "eval_loss")
    ends = ((0.0, before), (number(run.manifest, "result", "steps") or 1.0, after))
    return [(step, value) for step, value in ends if value is not None]


def measured_peak_bytes(run: RunData) -> float | None:
    """The measured peak of the manifest, or the largest one in the metrics."""
    logged = [value for event in ("train", "eval") for _, value in points(run.metrics, event, "peak_bytes")]
    return number(run.manifest, "memory", "peak_bytes") or max(logged, default=None)


def planned_bytes(manifest: Mapping[str, Any]) -> float | None:
    """The planned peak of the manifest, or the sum over its components."""
    components = component_bytes(manifest)
    return number(manifest, "memory", "planned_bytes") or (sum(components.values()) or None)


def component_bytes(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Planned bytes by component, largest first, without empty ones."""
    owners = section(manifest, "memory", "owners")
    sizes = {name: number(owners, name) or 0.0 for name in owners}
    return dict(sorted(((name, size) for name, size in sizes.items() if size > 0), key=lambda item: -item[1]))


def result(run: RunData) -> Facts:
    """The result of a finished run, or the state of a run in progress."""
    manifest, train = run.manifest, points(run.metrics, "train", "loss")
    steps = number(manifest, "result", "steps")
    last_step, last_loss = train[-1] if train else (None, None)
    loss = number(manifest, "result", "loss")
    facts = (
        _evaluations(run)
        | held_out_answers(run)
        | {
            "training loss, last step": _as(number_format.loss, last_loss if loss is None else loss),
            "steps": _as(number_format.count, last_step if steps is None else steps),
            "steps skipped (not finite)": _as(number_format.count, number(manifest, "result", "skipped_steps")),
            "of these by the loss scale": _as(number_format.count, number(manifest, "result", "overflow_steps")),
            "loss scale at the end": _as(number_format.count, number(manifest, "result", "loss_scale")),
            "trained tokens": _as(number_format.count, _trained_tokens(run)),
            "tokens/s, median": _as(number_format.count, median_speed(run)),
            "time": _as(Duration, number(manifest, "seconds")),
            "energy of all GPUs": _as(Energy, number(manifest, "energy_joules")),
            "peak memory, measured": _as(Size, measured_peak_bytes(run)),
            "peak memory, planned": _as(Size, planned_bytes(manifest)),
        }
    )
    return _non_empty(facts)


def data(run: RunData) -> Facts:
    """Records and tokens: read, dropped and why, kept, trained; and statistics of the labels where there are any."""
    counts = section(run.manifest, "data")
    dropped = section(counts, "dropped")
    rows, kept = number(counts, "rows"), number(counts, "kept")
    tokens, trained = number(counts, "tokens"), number(counts, "trained_tokens")
    facts = {"records read": _as(number_format.count, rows)}
    facts |= {f"dropped: {reason}": _as(number_format.count, number(dropped, reason)) for reason in dropped}
    facts |= {
        "examples kept": _with_share(kept, rows),
        "examples held out": _as(number_format.count, number(counts, "eval_rows")),
        "tokens": _as(number_format.count, tokens),
        "tokens trained": _with_share(trained, tokens),
        "tokens per example": f"{tokens / kept:,.1f}" if tokens is not None and kept else "",
        "sequences": _as(number_format.count, number(counts, "packed_rows")),
        "truncated": _as(number_format.count, number(counts, "truncated")),
        "duplicates": _as(number_format.count, number(counts, "duplicates")),
        "held-out examples in training too": _as(number_format.count, number(counts, "overlap")),
        "with a trained end token": _as(lambda share: number_format.share(share, 1.0), number(counts, "end_trained")),
        "with control strings": _as(number_format.count, number(counts, "control_rows")),
    }
    labels = section(counts, "labels")
    facts |= {f"labels: {name}": _plain(labels, name) for name in labels}
    return _non_empty(facts | {"sha256": _digest(counts)})


def setup(run: RunData) -> Facts:
    """Base model, how it is stored, and adapter."""
    manifest = run.manifest
    trainable, parameters = (
        number(manifest, "adapter", "trainable_parameters"),
        number(manifest, "adapter", "parameters"),
    )
    facts = {
        "base": string(manifest, "base", "name"),
        "base revision": string(manifest, "base", "revision")[:12],
        "base sha256": _digest(section(manifest, "base")),
        "base dtype": string(manifest, "base", "dtype"),
        "in float32, since near the end of float16": ", ".join(section(manifest, "float16", "in_float32")),
        "stored as": stored_as(manifest),
        "adapter": string(manifest, "adapter", "kind"),
        "rank": string(manifest, "adapter", "rank"),
        "alpha": _as(lambda alpha: f"{alpha:g}", number(manifest, "adapter", "alpha")),
        "dropout": _as(lambda share: f"{share:g}", number(manifest, "adapter", "dropout")),
        "adapted matrices": _as(number_format.count, float(len(adapted_paths(manifest))) or None),
        "trainable parameters": _with_share(trainable, parameters),
        "parameters": _as(number_format.count, parameters),
    }
    return _non_empty(facts)


def machine(run: RunData) -> Facts:
    """The hardware, and the versions that a result can depend on."""
    hardware = section(run.manifest, "machine")
    facts = {
        "device": string(hardware, "device"),
        "devices": string(hardware, "devices"),
        "device memory": _as(Size, number(hardware, "device_bytes")),
        "processes": string(hardware, "processes"),
        "CPU cores": string(hardware, "cpu_count"),
        "threads": string(hardware, "threads"),
        "host memory": _as(Size, number(hardware, "memory_bytes")),
        "platform": string(hardware, "platform"),
        "qlora": string(run.manifest, "qlora"),
    }
    versions = section(run.manifest, "versions")
    return _non_empty(facts | {name: string(versions, name) for name in versions})


def stored_as(manifest: Mapping[str, Any]) -> str:
    """How the frozen matrices are stored: `nf4, block 64, double quantization (224 matrices)`."""
    counts: dict[str, int] = {}
    quantized = section(manifest, "base", "quantized")
    for path in quantized:
        matrix = section(quantized, path)
        storage, count = _storage(matrix), matrix.get("matrices", 1)
        counts[storage] = counts.get(storage, 0) + (count if isinstance(count, int) else 1)
    return "; ".join(f"{way} ({count} {'matrix' if count == 1 else 'matrices'})" for way, count in counts.items())


def adapted_paths(manifest: Mapping[str, Any]) -> list[str]:
    """The module paths that have an adapter."""
    paths = section(manifest, "adapter").get("paths")
    return [str(path) for path in paths] if isinstance(paths, list | tuple) else []


def median_speed(run: RunData) -> float | None:
    """The median of tokens per second; a slow first step or an evaluation does not change it."""
    speeds = sorted(value for _, value in points(run.metrics, "train", "tokens_per_second"))
    return speeds[len(speeds) // 2] if speeds else None


def _evaluations(run: RunData) -> Facts:
    curve = held_out_losses(run)
    if not curve:
        return {}
    best = min(curve, key=lambda point: point[1])
    first = curve[0][1] if curve[0][0] == 0 or len(curve) > 1 else None
    last = curve[-1][1] if curve[-1][0] > 0 else None
    change = number_format.change(first, last) if first is not None and last is not None else ""
    best_loss, best_step = number(run.manifest, "result", "best_eval_loss"), number(run.manifest, "result", "best_step")
    return {
        "held-out loss before": _as(number_format.loss, first),
        "held-out loss after": _as(number_format.loss, last),
        "change": change,
        "best held-out loss": _as(number_format.loss, best[1] if best_loss is None else best_loss),
        "at step": _as(number_format.count, best[0] if best_step is None else best_step),
    }


def _trained_tokens(run: RunData) -> float | None:
    total = number(run.manifest, "result", "trained_tokens")
    if total is not None:
        return total
    return sum(value for _, value in points(run.metrics, "train", "trained_tokens")) or None


def _storage(settings: Mapping[str, Any]) -> str:
    block = f", block {settings['block']}" if settings.get("block") else ""
    return f"{settings.get('kind', 'unknown')}{block}{', double quantization' if settings.get('double') else ''}"


def _digest(values: Mapping[str, Any]) -> str:
    return string(values, "sha256")[:12]


def _plain(values: Mapping[str, Any], name: str) -> str:
    value = number(values, name)
    if value is None:
        return string(values, name)
    return f"{value:,.4g}" if value != int(value) else number_format.count(value)


def _with_share(part: float | None, total: float | None) -> str:
    if part is None:
        return ""
    return f"{number_format.count(part)} ({number_format.share(part, total)})" if total else number_format.count(part)


def _as(write: Callable[[float], Value], value: float | None) -> Value:
    return "" if value is None else write(value)


def _non_empty(facts: Facts) -> Facts:
    return {name: value for name, value in facts.items() if value != ""}
