"""`qlora advise RUN`: did it learn, did it forget, is the rank right, and what to change next."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora.runs.advise.verdict import Reason
from qlora.runs.artifacts import require_manifest
from qlora.runs.evaluate import evaluate_run
from qlora.runs.inspect_adapter import inspect_adapter
from qlora.runs.load_run import load_run
from qlora.runs.memory_setup import Log
from qlora.training.run_log import read_metrics

LEARNED = 0.02  # rule of thumb: relative fall of the held-out loss; less may be noise
FORGOT = 0.05  # rule of thumb: relative rise of the loss on general text
OVERFITTED = 0.02  # rule of thumb: how much worse the last evaluation may be than the best
MEMORIZED = 0.5  # rule of thumb: training loss over held-out loss, below this


def advise_after(run: str, log: Log = lambda line: None) -> dict[str, Any]:
    """The object of `qlora advise RUN --json`. InputError for a folder that is not a finished run."""
    summary = learning_summary(require_manifest(Path(run)), read_metrics(Path(run)))
    measured = evaluate_run(load_run(run, None, log), None, "loss", beside_base=True, log=log)
    general = measured["forgetting"]
    change = general["loss"] / general["base_loss"] - 1 if general["base_loss"] else 0.0
    rank = inspect_adapter(run, curve=False, picture=None, log=log)
    result = {
        "learnt": summary | {"base_loss": measured["base"]["loss"], "loss": measured["loss"], "rows": measured["rows"]},
        "forgot": {**general, "change": change},
        "rank": {key: rank[key] for key in ("verdict", "suggested_rank", "reason")},
    }
    reasons = (*_learning(result), *_forgetting(result), *_rank(result))
    return result | {"reasons": [asdict(reason) for reason in reasons]}


def learning_summary(manifest: Mapping[str, Any], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Steps and losses from the run's manifest and metrics."""
    result = manifest.get("result", {})
    losses = [line["loss"] for line in metrics if line.get("event") == "train" and line.get("loss") is not None]
    last = losses[-max(1, len(losses) // 10) :]  # the last tenth: the loss of a single step is noisy
    return {
        "steps": result.get("steps"),
        "train_loss": sum(last) / len(last) if last else None,
        "best_eval_loss": result.get("best_eval_loss"),
        "best_step": result.get("best_step"),
        "eval_loss": result.get("eval_loss"),
    }


def _learning(result: Mapping[str, Any]) -> Iterator[Reason]:
    summary = result["learnt"]
    before, after = summary["base_loss"], summary["loss"]
    share = 1 - after / before if before else 0.0
    losses = f"held-out loss {before:.4f} -> {after:.4f} ({-share:+.1%}) on {summary['rows']:,} examples"
    if share < LEARNED:
        yield Reason(f"it hardly learned: {losses}. Try more steps or a higher optim.learning_rate, and check the data")
    else:
        yield Reason(f"it learned: {losses}")
    yield from _overfitting(summary)


def _overfitting(summary: Mapping[str, Any]) -> Iterator[Reason]:
    best, last, train = summary["best_eval_loss"], summary["eval_loss"], summary["train_loss"]
    if best is not None and last is not None and last > best * (1 + OVERFITTED):
        yield Reason(
            f"it overfits: the best held-out loss was {best:.4f} at step {summary['best_step']}, the last is "
            f"{last:.4f}. Use fewer epochs, or train.early_stop"
        )
    if train is not None and last and train < MEMORIZED * last:
        yield Reason(
            f"it memorizes: training loss {train:.4f}, held-out loss {last:.4f}. "
            "Use more data, fewer epochs, or adapter.dropout"
        )


def _forgetting(result: Mapping[str, Any]) -> Iterator[Reason]:
    general = result["forgot"]
    losses = f"loss on general text {general['base_loss']:.4f} -> {general['loss']:.4f} ({general['change']:+.1%})"
    if general["change"] <= FORGOT:
        yield Reason(f"it did not forget: {losses} on {general['tokens']:,} tokens")
        return
    yield Reason(
        f"it forgot: {losses}. Use a lower optim.learning_rate or fewer steps, or add general text to the data",
        "the limit is a rule of thumb; LoRA forgets less than full fine-tuning: arXiv:2405.09673",
    )


def _rank(result: Mapping[str, Any]) -> Iterator[Reason]:
    rank = result["rank"]
    advice = {
        "too high": f"rank {rank['suggested_rank']} is enough",
        "saturated": f"try rank {rank['suggested_rank']}",
        "fits": "the rank is right",
        "untrained": "the adapter learned nothing",
    }
    yield Reason(f"rank: {rank['verdict']}; {rank['reason']}: {advice[rank['verdict']]}", "qlora inspect")


def as_lines(result: Mapping[str, Any]) -> list[str]:
    """The result as text."""
    return [f"- {reason['text']}  [{reason['source']}]" for reason in result["reasons"]]
