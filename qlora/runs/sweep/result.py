"""The result of a sweep: a table, a JSON object, sweep.json, and a page that compares all runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from qlora.data.types import Example
from qlora.errors import QloraError
from qlora.memory.meter import peak_bytes
from qlora.runs.compare import MAX_RUNS, write_report_page
from qlora.runs.report.markup import Markup
from qlora.runs.sweep.variant_run import VariantRun, error_text
from qlora.utils.atomic_files import write_json

SWEEP_JSON, PAGE = "sweep.json", "comparison.html"
VariantResult = dict[str, Any]


@dataclass(frozen=True)
class SweepResult:
    """The results of all variants in the order of the variants, and of the sweep as a whole."""

    summary: Mapping[str, Any]  # what `--json` prints
    failure: Exception | None  # the first one

    def table(self) -> str:
        """A line for each variant, lowest held-out loss first."""
        variants: Sequence[VariantResult] = self.summary["variants"]
        rows = [("variant", "steps", "loss", "held-out loss", "seconds")]
        for variant in sorted(variants, key=_sort_key):
            eval_loss = "failed" if variant["error"] else _loss_text(variant["eval_loss"])
            seconds = "kept" if variant["kept"] else f"{variant['seconds']:.1f}"
            rows.append((variant["name"], str(variant["steps"] or 0), _loss_text(variant["loss"]), eval_loss, seconds))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in range(1, len(row)))])
            for row in rows
        ]
        return "\n".join(lines + list(self.summary["notes"]))

    def refuse_failures(self) -> None:
        """QloraError if a variant failed; the run folders of the others are complete."""
        variants = self.summary["variants"]
        failed = [variant["name"] for variant in variants if variant["error"]]
        if failed:
            raise QloraError(
                f"{len(failed)} of {len(variants)} variants failed: {', '.join(failed)}. "
                "The others are complete; the same command tries these again."
            ) from self.failure


def write_result(runs: Sequence[VariantRun], out: Path, seconds: float, figure: Markup | None = None) -> SweepResult:
    """Write sweep.json and comparison.html into `out`; `figure` is drawn above the compared runs."""
    variants = [_variant_result(run) for run in runs]
    eval_sets = {id(run.setup.data): run.setup.data.eval for run in runs}
    same_eval_set = len({_digest(examples) for examples in eval_sets.values()}) == 1
    succeeded = sorted((variant for variant in variants if not variant["error"]), key=_sort_key)
    evaluated = [variant for variant in succeeded if variant["eval_loss"] is not None]
    notes = (
        [] if same_eval_set else ["The variants hold out different examples, so their held-out losses don't compare."]
    )
    if len(succeeded) > MAX_RUNS:
        notes.append(f"{PAGE} shows the best {MAX_RUNS} of {len(succeeded)}.")
    page = str(out / PAGE) if succeeded else None
    if page:
        write_report_page([variant["output"] for variant in succeeded[:MAX_RUNS]], page, figure)
    shared = runs[0].shared
    summary = {
        "output": str(out),
        "best": evaluated[0]["name"] if evaluated and same_eval_set else None,
        "seconds": round(seconds, 3),
        "planned_bytes": shared.plan.peak_bytes if shared.plan else None,
        "peak_bytes": peak_bytes(shared.base.device),
        "page": page,
        "notes": notes,
        "variants": variants,
    }
    write_json(out / SWEEP_JSON, summary)
    return SweepResult(summary, next((run.error for run in runs if run.error), None))


def _variant_result(run: VariantRun) -> VariantResult:
    """The result of one variant. `eval_loss` is that of the final adapter: with early stopping, of the best one."""
    result = dict((run.manifest or {}).get("result", {}))
    is_best = run.variant.recipe.train.early_stop is not None and result.get("best_eval_loss") is not None
    return {
        "name": run.name,
        "output": str(run.folder),
        "settings": dict(run.variant.settings),
        "steps": result.get("steps"),
        "loss": result.get("loss"),
        "eval_loss": result.get("best_eval_loss" if is_best else "eval_loss"),
        "trainable_parameters": run.setup.injection.trainable_parameters,
        "seconds": round(run.seconds, 3),
        "kept": run.kept,
        "error": error_text(run.error) if run.error else None,
    }


def _sort_key(variant: VariantResult) -> tuple[bool, bool, float]:
    loss = variant["eval_loss"]
    return variant["error"] is not None, loss is None, 0.0 if loss is None else loss


def _loss_text(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _digest(examples: Sequence[Example]) -> str:
    """Identifies held-out examples by their tokens and labels."""
    digest = sha256()
    for example in examples:
        for values in (example.input_ids, example.labels):
            digest.update(np.asarray(values, np.int64).tobytes())
    return digest.hexdigest()
