"""`qlora advise RECIPE` for an objective that compares answers: which method suits the data, and does SFT come first?

Measured: counts and lengths of the answers, and on held-out ones what the base model makes of them already.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from qlora.data.pairs import chosen_answers, sides_of
from qlora.data.prepare import prepare
from qlora.data.types import ROLES, Example
from qlora.distributed.single import Single
from qlora.errors import DataError
from qlora.recipe.dataset_profile import build_encoder
from qlora.recipe.recipe import Recipe
from qlora.runs.advise.verdict import Reason
from qlora.runs.evaluate_pairs import PER_TOKEN
from qlora.runs.memory_setup import Log, load_base, plan_if_known
from qlora.training.eval_loss import evaluate
from qlora.training.objectives import OBJECTIVES
from qlora.training.objectives.comparison_eval import evaluate_answers
from qlora.training.objectives.comparison_step import ComparisonStep
from qlora.training.side_log_probs import SideLogProbs

UNLEARNED = 2.0  # nats per token of the chosen answers, rule of thumb: the base does not write such answers yet
PREFERRED = 0.95  # rule of thumb: share of pairs whose chosen answer is likelier already
LONGER = 1.2  # rule of thumb: chosen answers so much longer than rejected ones teach length
BALANCE = 1.33  # of the weighted numbers of wanted and unwanted answers, at most: arXiv:2402.01306, equation 8
REFERENCE_FREE = "arXiv:2405.14734: the mean per token as reward"
Figures = Mapping[str, Any]


def advise_answers(recipe: Recipe, rows: int, log: Log = lambda line: None) -> dict[str, Any]:
    """The object of `qlora advise RECIPE --json`. DataError if no record can be compared; BaseModelError."""
    section, encoder = recipe.data.model_copy(update={"packing": False}), build_encoder(recipe)
    kind = recipe.objective.sided_format
    prepared = prepare(section, encoder, recipe.train.seed, shares_prefixes=False, sided_format=kind)
    prepared.report.raise_for_problems()
    if not len(prepared.train):
        raise DataError("data.train: no record is left to compare. `qlora check --json` says why.")
    held_out = list((prepared.eval or prepared.train)[:rows])
    figures = {
        "objective": recipe.objective.kind,
        "data": {"rows": prepared.report.rows, "kept": prepared.report.kept, **_answer_figures(prepared.train)},
        "base": _measure(recipe, held_out, log) if rows else None,
    }
    verdict, reasons = judge_answers(figures)
    return {**figures, "verdict": verdict, "reasons": [asdict(reason) for reason in reasons]}


def _answer_figures(examples: Sequence[Example]) -> dict[str, Any]:
    """Number and mean trained tokens of the answers of both roles."""
    counts, tokens = [0, 0], [0, 0]
    for index in range(len(examples)):
        example = examples[index]
        for side, conversation in zip(example.sides, sides_of(example), strict=True):
            counts[side.role] += 1
            tokens[side.role] += conversation.trained_tokens()
    return {
        key: value
        for role, name in enumerate(ROLES)
        for key, value in ((name, counts[role]), (f"{name}_tokens", tokens[role] / max(1, counts[role])))
    }


def _measure(recipe: Recipe, examples: Sequence[Example], log: Log) -> dict[str, Any]:
    """Loss of the chosen answers under the base, and the share of pairs whose chosen answer is likelier per token."""
    base = load_base(recipe, Single().device, plan_if_known(recipe), log)
    model, micro_batch, likelier = SideLogProbs(base.model), recipe.train.micro_batch, None
    chosen = evaluate(model, chosen_answers(examples), micro_batch, Single())
    if recipe.objective.sided_format == "preference":
        step = ComparisonStep(OBJECTIVES["simpo"](PER_TOKEN), model, nullcontext, in_one_row=False)
        pairs = evaluate_answers(step, examples, micro_batch, Single())
        likelier = pairs.answers["accuracy"] if pairs else None
    return {"rows": len(examples), "loss": chosen.loss if chosen and chosen.rows else None, "likelier": likelier}


def judge_answers(figures: Figures) -> tuple[str, list[Reason]]:
    """`sft`, `enough`, or the objective that suits the data; and the reasons."""
    base, data = figures["base"], figures["data"]
    reasons = [*_count_reasons(figures), *_base_reasons(base)]
    if base and base["loss"] is not None and base["loss"] > UNLEARNED and figures["objective"] != "orpo":
        return "sft", reasons
    if base and base["likelier"] is not None and base["likelier"] >= PREFERRED:
        return "enough", reasons
    if figures["objective"] == "kto":
        return "kto", reasons
    if base and base["loss"] is not None and base["loss"] > UNLEARNED:
        return "orpo", reasons
    return ("simpo" if data["chosen_tokens"] > LONGER * data["rejected_tokens"] else "dpo"), reasons


def _count_reasons(figures: Figures) -> Iterator[Reason]:
    data = figures["data"]
    if figures["objective"] == "kto":
        yield Reason(f"{data['chosen']:,} answers are labeled true, {data['rejected']:,} false", "counted")
        ratio = data["chosen"] / max(1, data["rejected"])
        if not 1 / BALANCE <= ratio <= BALANCE:
            name, weight = ("undesirable_weight", ratio) if ratio > 1 else ("desirable_weight", 1 / ratio)
            yield Reason(f"one label is rare: objective.{name}: {weight:.2g} balances it", "arXiv:2402.01306, (8)")
        return
    lengths = f"{data['chosen_tokens']:.0f} tokens a chosen answer, {data['rejected_tokens']:.0f} a rejected one"
    yield Reason(f"{data['chosen']:,} pairs, {lengths}", "counted")
    if data["chosen_tokens"] > LONGER * data["rejected_tokens"]:
        yield Reason("chosen answers are longer: sums of log-probabilities teach length", REFERENCE_FREE)


def _base_reasons(base: Figures | None) -> Iterator[Reason]:
    if not base:
        return
    if base["loss"] is not None:
        is_learned = base["loss"] <= UNLEARNED
        conclusion = "it writes such answers already" if is_learned else "it does not write such answers yet"
        yield Reason(f"the base model's loss on chosen answers is {base['loss']:.3f} a token: {conclusion}")
    if base["likelier"] is not None:
        yield Reason(
            f"of {base['rows']:,} held-out pairs, {base['likelier']:.0%} have the likelier chosen answer already"
        )


VERDICTS = {
    "sft": "supervised fine-tuning on the chosen answers first (objective.kind: sft), then this recipe with "
    "objective.reference: the folder of that run; or objective.kind: orpo, which does both at once",
    "enough": "the base model prefers the chosen answers already: there is little to learn from these pairs",
    "dpo": "objective.kind: dpo; ipo if labels are nearly certain and dpo overfits",
    "simpo": "objective.kind: simpo, whose reward is per token; or dpo on pairs of similar lengths",
    "orpo": "objective.kind: orpo, which learns to answer and to prefer in one run",
    "kto": "objective.kind: kto",
}
