"""The verdict of `qlora advise RECIPE`: thresholds, their sources, and the recommendation with its reasons.

A threshold without a named source is a rule of thumb, and is reported as one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora.data.types import count_of
from qlora.recipe.literature import LARGEST_RANK

NGRAM, NEAR = 5, 0.8  # tokens of an n-gram; share of n-grams in one other example: Lee et al. 2022, arXiv:2107.06499
FEW_RECORDS = 100  # rule of thumb: below, try a prompt first
ENOUGH_RECORDS = 1_000  # of good quality teach a style: Zhou et al. 2023 (LIMA), arXiv:2305.11206
KNOWN_LOSS = 0.3  # nats per token, rule of thumb: three of four of the base model's guesses are right
PROMPTED = 0.3  # rule of thumb: a larger relative fall of the loss with a few examples in the prompt is mostly format
UNSEEN = 0.3  # rule of thumb: share of an answer's words that are in no prompt and no training answer
NOISY = 0.2  # rule of thumb: share of records that repeat or contradict others
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Reason:
    """One finding with its number, and the source of the threshold."""

    text: str
    source: str = "rule of thumb"


def judge(figures: Figures) -> tuple[str, list[Reason]]:
    """`clean`, `prompt`, `retrieve`, `lora` or `full`, and the reasons."""
    data, novelty, shot = figures["data"], figures["novelty"], figures["few_shot"]
    reasons = [*_data_reasons(data), *_novelty_reasons(novelty), *_base_reasons(shot)]
    gain = _gain(shot)
    if data["duplicates"] + data["contradictions"] > NOISY * max(1, data["kept"]):
        return "clean", reasons
    if shot and shot["loss"] < KNOWN_LOSS:
        return "prompt", reasons
    if novelty["unseen_words"] > UNSEEN:
        return "retrieve", reasons
    if data["kept"] < FEW_RECORDS and gain > PROMPTED:
        return "prompt", reasons
    return ("full" if _exceeds_adapter(data) else "lora"), reasons


def _data_reasons(data: Figures) -> Iterable[Reason]:
    kept, tokens = max(1, data["kept"]), data["trained_tokens"]
    yield Reason(
        f"{data['kept']:,} records, {tokens:,} trained tokens: "
        + ("few; a prompt may do as well" if kept < FEW_RECORDS else "enough for a style or a format")
        + ("" if kept < FEW_RECORDS or kept >= ENOUGH_RECORDS else ", if they are good; 1,000 good ones teach it well"),
        "rule of thumb" if kept < FEW_RECORDS else "Zhou et al. 2023 (LIMA), arXiv:2305.11206",
    )
    dropped = data["rows"] - data["kept"]
    if dropped:
        yield Reason(f"{dropped:,} of {data['rows']:,} records are dropped: `qlora check --json` lists them", "counted")
    if data["duplicates"]:
        count = f"{data['duplicates']:,} records are duplicates ({data['duplicates'] / kept:.1%})"
        yield Reason(f"{count}: they are memorized first; remove them", "Lee et al. 2022, arXiv:2107.06499")
    if data["contradictions"]:
        yield Reason(f"{data['contradictions']:,} records have another answer to a prompt that occurs twice: noise")
    capacity = 2 * data["largest_adapter_parameters"]
    relation = "more than" if _exceeds_adapter(data) else "within"
    yield Reason(
        f"{tokens:,} trained tokens are {relation} the {capacity:,} bits of an adapter of rank {LARGEST_RANK}",
        "Schulman et al. 2025, LoRA Without Regret: two bits a parameter, one a token",
    )


def _exceeds_adapter(data: Figures) -> bool:
    return bool(data["trained_tokens"] > 2 * data["largest_adapter_parameters"])


def _novelty_reasons(novelty: Figures) -> Iterable[Reason]:
    near = f"{novelty['near']:.0%} of the held-out examples are nearly a training example"
    conclusion = "the held-out loss is too optimistic" if novelty["near"] > 0.1 else "the held-out loss can be trusted"
    yield Reason(f"{near}: {conclusion}", f"near: {NEAR:.0%} of its {NGRAM}-grams in one example, Lee et al. 2022")
    if novelty["unseen_words"] > UNSEEN:
        yield Reason(
            f"{novelty['unseen_words']:.0%} of the words in held-out answers are neither in their prompt nor in any "
            "training answer: the records do not contain this knowledge; add it to the prompt by retrieval (RAG)",
            "Ovadia et al. 2023, arXiv:2312.05934: retrieval beats tuning for knowledge; the limit is a rule of thumb",
        )


def _base_reasons(shot: Figures | None) -> Iterable[Reason]:
    if not shot:
        return
    if shot["loss"] < KNOWN_LOSS:
        yield Reason(f"the base model's loss on held-out examples is {shot['loss']:.3f} already: a prompt is enough")
    if shot["few_shot_loss"] is None:
        yield Reason("no training example fits into the model's context together with a held-out one: no few-shot loss")
        return
    examples = count_of(shot["shots"], "example")
    losses = f"loss {shot['loss']:.3f} -> {shot['few_shot_loss']:.3f} with {examples} in the prompt"
    mostly_format = _gain(shot) > PROMPTED
    conclusion = "much of the gain is format, which a prompt gives too" if mostly_format else "a prompt is not enough"
    yield Reason(f"{losses} ({-_gain(shot):+.0%}): {conclusion}")


def _gain(shot: Figures | None) -> float:
    """The relative fall of the loss with a few examples in the prompt."""
    if not shot or shot["few_shot_loss"] is None or not shot["loss"]:
        return 0.0
    return float(1 - shot["few_shot_loss"] / shot["loss"])


VERDICTS = {
    "clean": "clean the records first: too many repeat or contradict each other",
    "prompt": "try a prompt with a few of these records first; train if it costs too many tokens or is not good enough",
    "retrieve": "retrieve the knowledge (RAG), and train at most how to use it",
    "lora": "train: LoRA on the frozen base model fits these records",
    "full": "these records hold more than an adapter can: use full fine-tuning, or fewer records",
}


def as_lines(figures: Figures, verdicts: Mapping[str, str] = VERDICTS) -> list[str]:
    """The verdict and its reasons as text."""
    lines = [f"- {reason['text']}  [{reason['source']}]" for reason in figures["reasons"]]
    return [*lines, f"verdict: {verdicts[figures['verdict']]}"]
