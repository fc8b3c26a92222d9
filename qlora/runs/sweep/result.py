"""How a sweep ended: a table, a JSON object, sweep.json, and all runs on one page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from qlora.runs.compare import MOST_RUNS, draw
from qlora.data.types import Example
from qlora.errors import QloraError
from qlora.utils.atomic_files import write_json
from qlora.memory.meter import peak_bytes
from qlora.runs.sweep.variant_run import Runner, in_a_line

RECORD, PAGE = "sweep.json", "comparison.html"
Ended = dict[str, Any]  # how one variant ended


@dataclass(frozen=True)
class Outcome:
    """All variants in the order they were named, and what they took together."""

    found: Mapping[str, Any]  # as `--json` answers
    failure: Exception | None  # the first one

    def table(self) -> str:
        """A line for each variant, the best held-out loss first."""
        ended: Sequence[Ended] = self.found["variants"]
        rows = [("variant", "steps", "loss", "held-out loss", "seconds")]
        for each in sorted(ended, key=_rank):
            last = "failed" if each["error"] else _figure(each["eval_loss"])
            seconds = "kept" if each["kept"] else f"{each['seconds']:.1f}"
            rows.append((each["name"], str(each["steps"] or 0), _figure(each["loss"]), last, seconds))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(row[at].rjust(widths[at]) for at in range(1, len(row)))])
            for row in rows
        ]
        return "\n".join(lines + list(self.found["notes"]))

    def refuse_failures(self) -> None:
        """QloraError if a variant failed; the others' folders are whole."""
        failed = [each["name"] for each in self.found["variants"] if each["error"]]
        if failed:
            raise QloraError(
                f"{len(failed)} of {len(self.found['variants'])} variants failed: {', '.join(failed)}. "
                "The others are done; the same command tries these again."
            ) from self.failure


def outcome_of(runners: Sequence[Runner], out: Path, seconds: float) -> Outcome:
    """Write sweep.json and comparison.html into `out`."""
    ended = [_ended(runner) for runner in runners]
    alike = len({_digest(rows) for rows in {id(r.parts.data): r.parts.data.eval for r in runners}.values()}) == 1
    good = sorted((each for each in ended if not each["error"]), key=_rank)
    scored = [each for each in good if each["eval_loss"] is not None]
    notes = [] if alike else ["The variants hold out other rows, so that their held-out losses don't compare."]
    if len(good) > MOST_RUNS:
        notes.append(f"{PAGE} shows the best {MOST_RUNS} of {len(good)}.")
    page = str(out / PAGE) if good else None
    if page:
        draw([each["output"] for each in good[:MOST_RUNS]], page)
    shared = runners[0].shared
    found = {
        "output": str(out),
        "best": scored[0]["name"] if scored and alike else None,
        "seconds": round(seconds, 3),
        "planned_bytes": shared.plan.peak_bytes if shared.plan else None,
        "peak_bytes": peak_bytes(shared.base.device),
        "page": page,
        "notes": notes,
        "variants": ended,
    }
    write_json(out / RECORD, found)
    return Outcome(found, next((runner.error for runner in runners if runner.error), None))


def _ended(runner: Runner) -> Ended:
    """How one variant ended. `eval_loss` is that of the adapter that was left: with early stopping, of the best."""
    result = dict((runner.manifest or {}).get("result", {}))
    best = runner.variant.recipe.train.early_stop is not None and result.get("best_eval_loss") is not None
    return {
        "name": runner.name,
        "output": str(runner.folder),
        "settings": dict(runner.variant.settings),
        "steps": result.get("steps"),
        "loss": result.get("loss"),
        "eval_loss": result.get("best_eval_loss" if best else "eval_loss"),
        "trainable_parameters": runner.parts.injected.trainable_parameters,
        "seconds": round(runner.seconds, 3),
        "kept": runner.kept,
        "error": in_a_line(runner.error) if runner.error else None,
    }


def _rank(each: Ended) -> tuple[bool, bool, float]:
    loss = each["eval_loss"]
    return each["error"] is not None, loss is None, 0.0 if loss is None else loss


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _digest(rows: Sequence[Example]) -> str:
    """Names held-out rows by their tokens and labels."""
    digest = sha256()
    for row in rows:
        for values in (row.input_ids, row.labels):
            digest.update(np.asarray(values, np.int64).tobytes())
    return digest.hexdigest()
