"""What the figures of `qlora advise RECIPE` come to: a verdict, and reasons with their numbers and sources.

A threshold with a source is that source's; the others are rules of thumb and say so.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora.data.types import counted

GRAM, NEAR = 5, 0.8  # runs of tokens, and the share of them in one other row: Lee et al. 2022, arXiv:2107.06499
LARGEST_RANK = 256  # what Schulman et al. 2025 (LoRA Without Regret) found as good as full fine-tuning on such sets
FEW_ROWS = 100  # rule of thumb: below, a prompt is worth trying first
ENOUGH_ROWS = 1_000  # of good quality teach a style: Zhou et al. 2023 (LIMA), arXiv:2305.11206
KNOWN_LOSS = 0.3  # nats a token, rule of thumb: of the base's guesses three in four are right
PROMPTED = 0.3  # rule of thumb: so much less loss with a few rows shown is mostly format
UNSEEN = 0.3  # rule of thumb: of an answer's words, neither asked about nor in any training answer
NOISY = 0.2  # rule of thumb: share of rows that repeat or contradict others
Found = Mapping[str, Any]


@dataclass(frozen=True)
class Reason:
    """One finding: what was measured, in words with its number, and where the threshold is from."""

    text: str
    source: str = "rule of thumb"


def judge(found: Found) -> tuple[str, list[Reason]]:
    """`clean`, `prompt`, `retrieve`, `lora` or `full`, and why."""
    data, novel, shot = found["data"], found["novelty"], found["few_shot"]
    reasons = [*_about_data(data), *_about_novelty(novel), *_about_base(shot)]
    gain = _gain(shot)
    if data["duplicates"] + data["contradictions"] > NOISY * max(1, data["kept"]):
        return "clean", reasons
    if shot and shot["loss"] < KNOWN_LOSS:
        return "prompt", reasons
    if novel["unseen_words"] > UNSEEN:
        return "retrieve", reasons
    if data["kept"] < FEW_ROWS and gain > PROMPTED:
        return "prompt", reasons
    return ("full" if _too_much(data) else "lora"), reasons


def _about_data(data: Found) -> Iterable[Reason]:
    kept, tokens = max(1, data["kept"]), data["trained_tokens"]
    yield Reason(
        f"{data['kept']:,} rows, {tokens:,} trained tokens: "
        + ("few; a prompt may do as well" if kept < FEW_ROWS else "enough for a style or a format")
        + ("" if kept < FEW_ROWS or kept >= ENOUGH_ROWS else ", if they are good; 1,000 good ones teach it well"),
        "rule of thumb" if kept < FEW_ROWS else "Zhou et al. 2023 (LIMA), arXiv:2305.11206",
    )
    lost = data["rows"] - data["kept"]
    if lost:
        yield Reason(f"{lost:,} of {data['rows']:,} rows are dropped: `qlora check` names each", "counted")
    if data["duplicates"]:
        again = f"{data['duplicates']:,} rows say the same as another ({data['duplicates'] / kept:.1%})"
        yield Reason(f"{again}: they are learnt by heart first; take them out", "Lee et al. 2022, arXiv:2107.06499")
    if data["contradictions"]:
        yield Reason(f"{data['contradictions']:,} rows give another answer to a prompt that stands there twice: noise")
    capacity = 2 * data["largest_adapter_parameters"]
    told = "more than" if _too_much(data) else "within"
    yield Reason(
        f"{tokens:,} trained tokens are {told} the {capacity:,} bits that an adapter of rank {LARGEST_RANK} holds",
        "Schulman et al. 2025, LoRA Without Regret: two bits a parameter, one a token",
    )


def _too_much(data: Found) -> bool:
    return bool(data["trained_tokens"] > 2 * data["largest_adapter_parameters"])


def _about_novelty(novel: Found) -> Iterable[Reason]:
    near = f"{novel['near']:.0%} of the held-out rows are nearly a training row"
    ending = ": their loss will flatter the run" if novel["near"] > 0.1 else ": the held-out loss can be trusted"
    yield Reason(near + ending, f"near: {NEAR:.0%} of its runs of {GRAM} tokens in one row, Lee et al. 2022")
    if novel["unseen_words"] > UNSEEN:
        yield Reason(
            f"{novel['unseen_words']:.0%} of the words in held-out answers are neither in their prompt nor in any "
            "training answer: knowledge that these rows do not bring; put it into the prompt by retrieval (RAG)",
            "Ovadia et al. 2023, arXiv:2312.05934, that retrieval beats tuning for knowledge; the limit is ours",
        )


def _about_base(shot: Found | None) -> Iterable[Reason]:
    if not shot:
        return
    if shot["loss"] < KNOWN_LOSS:
        yield Reason(f"the base's loss on held-out rows is {shot['loss']:.3f} already: it can do this when asked")
    if shot["few_shot_loss"] is None:
        yield Reason("no training row fits beside a held-out one in the model's context: few-shot was left out")
        return
    told = f"{counted(shot['shots'])} shown first: loss {shot['loss']:.3f} -> {shot['few_shot_loss']:.3f}"
    much = _gain(shot) > PROMPTED
    ending = "much of it is format, which a prompt gives too" if much else "a prompt alone does not do it"
    yield Reason(f"{told} ({-_gain(shot):+.0%}): {ending}")


def _gain(shot: Found | None) -> float:
    """The share of the loss that goes when a few rows are shown."""
    if not shot or shot["few_shot_loss"] is None or not shot["loss"]:
        return 0.0
    return float(1 - shot["few_shot_loss"] / shot["loss"])


VERDICTS = {
    "clean": "clean the rows first: too many repeat or contradict each other",
    "prompt": "try a prompt with a few of these rows first; train when it costs too many tokens or is not good enough",
    "retrieve": "retrieve the knowledge (RAG), and train at most how to use it",
    "lora": "train: LoRA on the frozen base is the right tool",
    "full": "there is more in these rows than an adapter holds: full fine-tuning, or fewer of them",
}


def as_lines(found: Found) -> list[str]:
    """The answer for people."""
    lines = [f"- {reason['text']}  [{reason['source']}]" for reason in found["reasons"]]
    return [*lines, f"so: {VERDICTS[found['verdict']]}"]
