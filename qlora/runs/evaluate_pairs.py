"""`qlora eval --task preference`: how often, and by how much, a model prefers the chosen answer of a pair."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from qlora.adapters.switch import disable_adapters
from qlora.data.types import Example
from qlora.distributed.single import Single
from qlora.errors import InputError
from qlora.runs.load_run import LoadedRun, held_out_pairs
from qlora.runs.objective_setup import build_comparison, one_row
from qlora.training.objectives import OBJECTIVES, Objective
from qlora.training.objectives.comparison_eval import AnswersEvaluation, evaluate_answers
from qlora.training.objectives.comparison_step import ComparisonStep
from qlora.training.side_log_probs import SideLogProbs
from qlora.utils.progress import ProgressReporter

PER_TOKEN = Objective(kind="simpo", beta=1.0, gamma=0.0)  # its reward is the mean log-probability of a token


def evaluate_pairs(run: LoadedRun, data: str | None, beside_base: bool, log: Callable[[str], None]) -> dict[str, Any]:
    """The JSON object of the task. `likelier`: pairs whose chosen answer is likelier, per token.

    `score` and `margin`: pairs whose chosen answer has the higher reward of the run's objective, and by how much; where
    the run has none, the reward is the log-probability of a token. `beside_base`: `likelier` of the base too.
    """
    if beside_base and run.adapter is None:
        raise InputError("--beside-base: needs an adapter; this is a base model. Leave the option out.")
    pairs, loss = held_out_pairs(run, data), SideLogProbs(run.base.model)
    per_token = ComparisonStep(OBJECTIVES["simpo"](PER_TOKEN), loss, nullcontext, one_row(run.recipe, run.base))
    result = _measure(run, per_token, pairs, log)
    likelier = result.answers["accuracy"]
    if run.recipe.objective.sided_format == "preference" and run.adapter is not None:
        step = build_comparison(run.recipe, run.base, loss, log, start=False)
        result = _measure(run, step, pairs, log) if step is not None else result
    base = {}
    if beside_base:
        with disable_adapters(run.base.model):
            base = {"base": {"likelier": _measure(run, per_token, pairs, log).answers["accuracy"]}}
    return {
        "task": "preference",
        "loss": result.loss,
        "perplexity": None,
        "score": result.answers["accuracy"],
        "margin": result.answers["margin"],
        "likelier": likelier,
        "chosen_log_prob": result.answers["chosen_log_prob"],
        "rejected_log_prob": result.answers["rejected_log_prob"],
        "rows": result.rows,
        "tokens": result.tokens,
        **base,
    }


def _measure(
    run: LoadedRun, step: ComparisonStep, pairs: Sequence[Example], log: Callable[[str], None]
) -> AnswersEvaluation:
    progress = ProgressReporter(log, "evaluating", "pairs")
    evaluation = evaluate_answers(step, pairs, run.recipe.train.micro_batch, Single(), progress=progress)
    assert evaluation is not None  # only an interrupted evaluation is None
    return evaluation
