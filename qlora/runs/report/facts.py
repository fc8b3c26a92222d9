"""Manifest and metrics as named values in people's words: the rows of every table, one column a run."""

from collections.abc import Callable, Mapping
from typing import Any

from qlora.runs.report import number_format
from qlora.runs.report.quantities import Duration, Energy, Size, Value
from qlora.runs.report.run_data import RunData, number, section, word
from qlora.runs.report.series import Point, points

Facts = dict[str, Value]  # what it is -> its value, with the unit


def held_out(run: RunData) -> list[Point]:
    """(step, held-out loss) of every evaluation; from the manifest's first and last where there are no metrics."""
    found = points(run.metrics, "eval", "eval_loss")
    if found:
        return found
    before, after = number(run.manifest, "result", "eval_loss_before"), number(run.manifest, "result", "eval_loss")
    ends = ((0.0, before), (number(run.manifest, "result", "steps") or 1.0, after))
    return [(step, value) for step, value in ends if value is not None]


def peak_bytes(run: RunData) -> float | None:
    """The measured peak: the manifest's, or the largest that was logged."""
    logged = [value for event in ("train", "eval") for _, value in points(run.metrics, event, "peak_bytes")]
    return number(run.manifest, "memory", "peak_bytes") or max(logged, default=None)


def planned_bytes(manifest: Mapping[str, Any]) -> float | None:
    """The planned peak: as stated, or the sum over its owners."""
    owners = owners_of(manifest)
    return number(manifest, "memory", "planned_bytes") or (sum(owners.values()) or None)


def owners_of(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Planned bytes by owner, largest first, those with none left out."""
    owners = section(manifest, "memory", "owners")
    found = {name: number(owners, name) or 0.0 for name in owners}
    return dict(sorted(((name, size) for name, size in found.items() if size > 0), key=lambda item: -item[1]))


def result(run: RunData) -> Facts:
    """How the run ended, or how far it is."""
    manifest, train = run.manifest, points(run.metrics, "train", "loss")
    steps = number(manifest, "result", "steps")
    last_step, last_loss = train[-1] if train else (None, None)
    loss = number(manifest, "result", "loss")
    facts = _evaluations(run) | {
        "training loss, last step": _as(number_format.loss, last_loss if loss is None else loss),
        "steps": _as(number_format.count, last_step if steps is None else steps),
        "steps skipped (not finite)": _as(number_format.count, number(manifest, "result", "skipped_steps")),
        "trained tokens": _as(number_format.count, _trained_tokens(run)),
        "tokens/s, median": _as(number_format.count, median_speed(run)),
        "time": _as(Duration, number(manifest, "seconds")),
        "energy of the cards": _as(Energy, number(manifest, "energy_joules")),
        "peak memory, measured": _as(Size, peak_bytes(run)),
        "peak memory, planned": _as(Size, planned_bytes(manifest)),
    }
    return _known(facts)


def data(run: RunData) -> Facts:
    """Rows and tokens: read, dropped and why, kept, trained; and the label statistics where there are any."""
    counts = section(run.manifest, "data")
    dropped = section(counts, "dropped")
    rows, kept = number(counts, "rows"), number(counts, "kept")
    tokens, trained = number(counts, "tokens"), number(counts, "trained_tokens")
    facts = {"rows read": _as(number_format.count, rows)}
    facts |= {f"dropped: {reason}": _as(number_format.count, number(dropped, reason)) for reason in dropped}
    facts |= {
        "rows kept": _of(kept, rows),
        "rows held out": _as(number_format.count, number(counts, "eval_rows")),
        "tokens": _as(number_format.count, tokens),
        "tokens trained": _of(trained, tokens),
        "tokens a kept row": f"{tokens / kept:,.1f}" if tokens is not None and kept else "",
        "rows to train on": _as(number_format.count, number(counts, "packed_rows")),
        "rows cut": _as(number_format.count, number(counts, "truncated")),
        "rows that say the same": _as(number_format.count, number(counts, "duplicates")),
        "held-out rows in training too": _as(number_format.count, number(counts, "overlap")),
        "rows with a trained end": _as(lambda share: number_format.share(share, 1.0), number(counts, "end_trained")),
        "rows with control strings": _as(number_format.count, number(counts, "control_rows")),
    }
    labels = section(counts, "labels")
    return _known(facts | {f"labels: {name}": _plain(labels, name) for name in labels} | {"sha256": _digest(counts)})


def setup(run: RunData) -> Facts:
    """What was trained on what: base, how it is stored, adapter."""
    manifest = run.manifest
    trainable, parameters = (
        number(manifest, "adapter", "trainable_parameters"),
        number(manifest, "adapter", "parameters"),
    )
    facts = {
        "base": word(manifest, "base", "name"),
        "base revision": word(manifest, "base", "revision")[:12],
        "base sha256": _digest(section(manifest, "base")),
        "base dtype": word(manifest, "base", "dtype"),
        "stored as": stored_as(manifest),
        "adapter": word(manifest, "adapter", "kind"),
        "rank": word(manifest, "adapter", "rank"),
        "alpha": _as(lambda alpha: f"{alpha:g}", number(manifest, "adapter", "alpha")),
        "dropout": _as(lambda share: f"{share:g}", number(manifest, "adapter", "dropout")),
        "adapted matrices": _as(number_format.count, float(len(adapted_paths(manifest))) or None),
        "trainable parameters": _of(trainable, parameters),
        "parameters": _as(number_format.count, parameters),
    }
    return _known(facts)


def machine(run: RunData) -> Facts:
    """The hardware, and the versions that a result can depend on."""
    found = section(run.manifest, "machine")
    facts = {
        "device": word(found, "device"),
        "devices": word(found, "devices"),
        "device memory": _as(Size, number(found, "device_bytes")),
        "processes": word(found, "processes"),
        "CPU cores": word(found, "cpu_count"),
        "threads": word(found, "threads"),
        "main memory": _as(Size, number(found, "memory_bytes")),
        "platform": word(found, "platform"),
        "qlora": word(run.manifest, "qlora"),
    }
    versions = section(run.manifest, "versions")
    return _known(facts | {name: word(versions, name) for name in versions})


def stored_as(manifest: Mapping[str, Any]) -> str:
    """How the frozen matrices are stored: `nf4, blocks of 64, absmax quantised again (224 matrices)`."""
    ways: dict[str, int] = {}
    quantized = section(manifest, "base", "quantized")
    for path in quantized:
        how = _way(section(quantized, path))
        ways[how] = ways.get(how, 0) + 1
    return "; ".join(f"{how} ({many} {'matrix' if many == 1 else 'matrices'})" for how, many in ways.items())


def adapted_paths(manifest: Mapping[str, Any]) -> list[str]:
    """The module paths that have an adapter."""
    paths = section(manifest, "adapter").get("paths")
    return [str(path) for path in paths] if isinstance(paths, list | tuple) else []


def median_speed(run: RunData) -> float | None:
    """Tokens a second in the middle of the ordered steps: a slow first step or an evaluation does not move it."""
    speeds = sorted(value for _, value in points(run.metrics, "train", "tokens_per_second"))
    return speeds[len(speeds) // 2] if speeds else None


def _evaluations(run: RunData) -> Facts:
    curve = held_out(run)
    if not curve:
        return {}
    best = min(curve, key=lambda point: point[1])
    first = curve[0][1] if curve[0][0] == 0 or len(curve) > 1 else None
    last = curve[-1][1] if curve[-1][0] > 0 else None
    moved = number_format.change(first, last) if first is not None and last is not None else ""
    best_loss, best_step = number(run.manifest, "result", "best_eval_loss"), number(run.manifest, "result", "best_step")
    return {
        "held-out loss before": _as(number_format.loss, first),
        "held-out loss after": _as(number_format.loss, last),
        "change": moved,
        "best held-out loss": _as(number_format.loss, best[1] if best_loss is None else best_loss),
        "at step": _as(number_format.count, best[0] if best_step is None else best_step),
    }


def _trained_tokens(run: RunData) -> float | None:
    stated = number(run.manifest, "result", "trained_tokens")
    return (
        sum(value for _, value in points(run.metrics, "train", "trained_tokens")) or None if stated is None else stated
    )


def _way(how: Mapping[str, Any]) -> str:
    block = f", blocks of {how['block']}" if how.get("block") else ""
    return f"{how.get('kind', 'unknown')}{block}{', absmax quantised again' if how.get('double') else ''}"


def _digest(of: Mapping[str, Any]) -> str:
    return word(of, "sha256")[:12]


def _plain(of: Mapping[str, Any], name: str) -> str:
    value = number(of, name)
    return word(of, name) if value is None else f"{value:,.4g}" if value != int(value) else number_format.count(value)


def _of(part: float | None, whole: float | None) -> str:
    if part is None:
        return ""
    return f"{number_format.count(part)} ({number_format.share(part, whole)})" if whole else number_format.count(part)


def _as(write: Callable[[float], Value], value: float | None) -> Value:
    return "" if value is None else write(value)


def _known(facts: Facts) -> Facts:
    return {name: value for name, value in facts.items() if value != ""}
