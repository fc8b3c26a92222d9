"""Exact match: a generated answer is correct if its text, or the number it ends in, is that of the reference."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora.data.prefix_tree import paths_of
from qlora.data.types import IGNORED, Example

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Question:
    """A held-out example as prompt and reference answer."""

    where: str
    prompt_ids: list[int]
    reference: str


def question(example: Example, tokenizer: Any) -> Question:
    """The last run of trained tokens is the reference answer, everything before it the prompt."""
    example = paths_of(example)[-1]  # of a prefix tree the last answer, which has the longest context
    trained = np.flatnonzero(np.asarray(example.labels) != IGNORED)
    end = int(trained[-1]) + 1
    gaps = np.flatnonzero(np.diff(trained) > 1)
    start = int(trained[gaps[-1] + 1] if len(gaps) else trained[0])
    ids = np.asarray(example.input_ids).tolist()
    return Question(example.where, ids[:start], text_of(ids[start:end], tokenizer))


def text_of(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of an answer, without special tokens and surrounding whitespace."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def exact_match(answer: str, reference: str) -> bool:
    """Whether the texts are equal; for a reference that ends in `#### 42` (GSM8K), whether the last numbers are."""
    marked = re.search(r"####\s*(\S+)", reference)
    if not marked:
        return answer.strip() == reference.strip()
    numbers = NUMBER.findall(answer.split("####")[-1])
    return bool(numbers) and _number(numbers[-1]) == _number(marked.group(1))


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", "").rstrip("."))
    except ValueError:
        return text
