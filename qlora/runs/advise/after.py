"""`qlora advise RUN`: did it learn, did it forget, is the rank right, and what to change next."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora.runs.artifacts import MANIFEST
from qlora.runs.evaluate_and_generate import measure
from qlora.errors import InputError
from qlora.utils.atomic_files import read_json
from qlora.runs.inspect_adapter import inspect_adapter
from qlora.runs.advise.verdict import Reason
from qlora.runs.load_run import load_run
from qlora.training.run_log import read_metrics

LEARNT = 0.02  # rule of thumb: of the held-out loss; less may be noise
FORGOT = 0.05  # rule of thumb: rise of the loss on general text
OVERFITTED = 0.02  # rule of thumb: how much the last evaluation may be worse than the best
BY_HEART = 0.5  # rule of thumb: training loss below so much of the held-out one
Say = Callable[[str], None]


def advise_after(run: str, say: Say = lambda line: None) -> dict[str, Any]:
    """What `qlora advise RUN --json` answers. InputError for a folder that is no finished run."""
    manifest = _manifest(Path(run))
    learnt = learnt_by(manifest, read_metrics(Path(run)))
    measured = measure(load_run(run, None, say), None, "loss", beside_base=True, say=say)
    general = measured["forgetting"]
    change = general["loss"] / general["base_loss"] - 1 if general["base_loss"] else 0.0
    rank = inspect_adapter(run, curve=False, picture=None, say=say)
    found = {
        "learnt": learnt | {"base_loss": measured["base"]["loss"], "loss": measured["loss"], "rows": measured["rows"]},
        "forgot": {**general, "change": change},
        "rank": {key: rank[key] for key in ("verdict", "suggested_rank", "reason")},
    }
    return found | {"reasons": [asdict(reason) for reason in (*_learning(found), *_forgetting(found), *_rank(found))]}


def learnt_by(manifest: Mapping[str, Any], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """What the run wrote down of its own learning."""
    result = manifest.get("result", {})
    losses = [line["loss"] for line in metrics if line.get("event") == "train" and line.get("loss") is not None]
    last = losses[-max(1, len(losses) // 10) :]  # the last tenth: one step's loss is noise
    return {
        "steps": result.get("steps"),
        "train_loss": sum(last) / len(last) if last else None,
        "best_eval_loss": result.get("best_eval_loss"),
        "best_step": result.get("best_step"),
        "eval_loss": result.get("eval_loss"),
    }


def _manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: is neither a recipe's file nor a finished run: it has no {MANIFEST}.")
    try:
        return read_json(folder / MANIFEST)
    except ValueError as error:
        raise InputError(f"{folder / MANIFEST}: is damaged ({error}).") from None


def _learning(found: Mapping[str, Any]) -> Iterator[Reason]:
    learnt = found["learnt"]
    before, after = learnt["base_loss"], learnt["loss"]
    share = 1 - after / before if before else 0.0
    told = f"held-out loss {before:.4f} -> {after:.4f} ({-share:+.1%}) on {learnt['rows']:,} rows"
    if share < LEARNT:
        yield Reason(f"it hardly learnt: {told}. More steps, a higher optim.learning_rate, or are the rows learnable?")
    else:
        yield Reason(f"it learnt: {told}")
    yield from _overfitting(learnt)


def _overfitting(learnt: Mapping[str, Any]) -> Iterator[Reason]:
    best, last, train = learnt["best_eval_loss"], learnt["eval_loss"], learnt["train_loss"]
    if best is not None and last is not None and last > best * (1 + OVERFITTED):
        yield Reason(
            f"the best held-out loss was {best:.4f} at step {learnt['best_step']}, the last is {last:.4f}: it "
            "overfits. Fewer epochs, or train.early_stop"
        )
    if train is not None and last and train < BY_HEART * last:
        yield Reason(
            f"training loss {train:.4f} against {last:.4f} on held-out rows: rows are learnt by heart. "
            "More rows, fewer epochs, or adapter.dropout"
        )


def _forgetting(found: Mapping[str, Any]) -> Iterator[Reason]:
    general = found["forgot"]
    told = f"loss on general text {general['base_loss']:.4f} -> {general['loss']:.4f} ({general['change']:+.1%})"
    if general["change"] <= FORGOT:
        yield Reason(f"it did not forget: {told} on {general['tokens']:,} tokens")
        return
    yield Reason(
        f"it forgot: {told}. A lower optim.learning_rate, fewer steps, or some general rows among the training rows",
        "the limit is a rule of thumb; that LoRA forgets less than full fine-tuning: arXiv:2405.09673",
    )


def _rank(found: Mapping[str, Any]) -> Iterator[Reason]:
    rank = found["rank"]
    ending = {
        "too high": f"rank {rank['suggested_rank']} would do",
        "saturated": f"try rank {rank['suggested_rank']}",
        "fits": "the rank is right",
        "untrained": "nothing was learnt",
    }
    yield Reason(f"rank: {rank['verdict']}; {rank['reason']}: {ending[rank['verdict']]}", "qlora inspect")


def as_lines(found: Mapping[str, Any]) -> list[str]:
    """The answer for people."""
    return [f"- {reason['text']}  [{reason['source']}]" for reason in found["reasons"]]
