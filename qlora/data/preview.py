"""A preview of the training examples: their text in segments, and each answer with its context."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora.data.batching.fit_length import fit_length
from qlora.data.conversations.build_example import Encoded
from qlora.data.conversations.encode_records import encode_records
from qlora.data.conversations.encoder import Encoder
from qlora.data.pairs import sides_of, with_trained_prompts
from qlora.data.prefix_tree import paths_of
from qlora.data.reading import source
from qlora.data.reading.resolve_paths import resolve_source
from qlora.data.types import IGNORED, ROLES, Example

if TYPE_CHECKING:
    from qlora.data import Data


_CHUNK_RECORDS = 16  # records encoded together: a preview shows a few


@dataclass(frozen=True)
class Segment:
    """A run of text whose tokens are all trained, or all not, in one run of the example's tree.

    thought: of an answer, with what the template writes around it. branch: 0 for the tokens from the first on, which
    the branches share or part of; then 1 for the first branch, and so on.
    """

    text: str
    trained: bool
    thought: bool = False
    branch: int = 0


def segments(example: Example, encoder: Encoder) -> list[Segment]:
    """The decoded text of `example`, split where training begins and ends, at branches, and after thoughts."""
    trained = example.labels != IGNORED
    starts = [branch.start for branch in example.branches]
    bounds = sorted({0, len(example), *starts, *(np.flatnonzero(np.diff(trained)) + 1).tolist()})
    text = encoder.decode(example.input_ids)
    ends = [0]
    for bound in bounds[1:-1]:
        # A character of several tokens belongs to the segment that completes it.
        prefix = encoder.decode(example.input_ids[:bound]).rstrip("\ufffd")
        ends.append(max(ends[-1], len(prefix) if text.startswith(prefix) else ends[-1]))
    ends.append(len(text))
    parts = list[Segment]()
    for (start, end), bound in zip(pairwise(ends), bounds, strict=False):
        branch = sum(first <= bound for first in starts)
        parts += _with_thought(text[start:end], bool(trained[bound]), branch, encoder.thought_closing)
    return parts


def _with_thought(text: str, trained: bool, branch: int, closing: str) -> list[Segment]:
    """A segment, or two if it begins with a thought. closing: what the template writes after one."""
    thought, ending, rest = text.partition(closing) if trained and closing else ("", "", text)
    if not ending:
        return [Segment(text, trained, branch=branch)]
    return [
        Segment(thought + ending, trained, True, branch),
        *([Segment(rest, trained, branch=branch)] if rest else []),
    ]


def answers_of(example: Example) -> list[dict[str, Any]]:
    """Each trained stretch with all tokens that it sees before it, shortest context first."""
    if example.sides:
        sides = zip(sides_of(example), example.sides, strict=True)
        return [answer | {"role": ROLES[side.role]} for item, side in sides for answer in answers_of(item)]
    answers = []
    for path in paths_of(example):
        trained = np.append(path.labels != IGNORED, False)
        trained[0] = False  # nothing is before the first token: it is not predicted
        edges = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=0)).tolist()
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            context, own = path.input_ids[:start].tolist(), path.input_ids[start:end].tolist()
            answers.append({"context_ids": context, "trained_ids": own, "role": "assistant"})
    return sorted(answers, key=lambda answer: len(answer["context_ids"]))


def preview(
    section: "Data",
    encoder: Encoder,
    count: int,
    seed: int = 0,
    sided_format: str | None = None,
    learns_prompts: bool = False,
) -> list[dict[str, Any]]:
    """The first `count` usable examples as JSON objects: where, input_ids, labels (before the shift), segments,
    branches, answers.

    Examples above max_length are split, truncated or left out, as in training. sided_format: as in `prepare`.
    learns_prompts: labels and segments mark the prompts of chosen answers as trained too; `answers` holds answers only.
    """
    examples = islice(_examples(section, encoder, seed, sided_format), count)
    return [as_json(example, encoder, learns_prompts) for example in examples]


def as_json(example: Example, encoder: Encoder, learns_prompts: bool = False) -> dict[str, Any]:
    """An example as an object of `qlora preview --json`."""
    labeled = with_trained_prompts(example) if learns_prompts else example
    return {
        "where": example.where,
        "input_ids": example.input_ids.tolist(),
        "labels": labeled.labels.tolist(),
        "segments": [asdict(part) for part in segments(labeled, encoder)],
        "branches": [list(branch) for branch in example.branches],  # [first token, the token that it follows]
        "answers": answers_of(example),
    }


def _examples(section: "Data", encoder: Encoder, seed: int, sided_format: str | None) -> Iterator[Example]:
    for index, item in enumerate(section.train):
        records = source.read_records(item, resolve_source(item), (seed, index))
        kind = sided_format or item.format or section.format
        for _, result in encode_records(records, kind, encoder, chunk_records=_CHUNK_RECORDS):
            if isinstance(result, Encoded):
                yield from fit_length(result, section).examples
