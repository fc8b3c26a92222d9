"""Rows as they will be trained, with their text in stretches that are trained or not."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora.data.conversations.build_example import Encoded
from qlora.data.conversations.encode_records import encoded_rows
from qlora.data.conversations.encoder import Encoder
from qlora.data.reading import source
from qlora.data.reading.resolve_paths import locate
from qlora.data.types import IGNORED, Example

if TYPE_CHECKING:
    from qlora.data import Data


_AT_ONCE = 16  # rows read ahead: a preview shows a few


@dataclass(frozen=True)
class Segment:
    """A stretch of a row's text, and whether its tokens are trained."""

    text: str
    trained: bool


def segments(example: Example, encoder: Encoder) -> list[Segment]:
    """The text of `example` cut where training begins and ends; joined, it is the decoded row."""
    trained = example.labels != IGNORED
    cuts = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(example)]
    whole = encoder.decode(example.input_ids)
    ends = [0]
    for cut in cuts[1:-1]:
        # a character of several tokens belongs to the stretch that completes it
        text = encoder.decode(example.input_ids[:cut]).rstrip("\ufffd")
        ends.append(max(ends[-1], len(text) if whole.startswith(text) else ends[-1]))
    ends.append(len(whole))
    flags = [bool(trained[cut]) for cut in cuts[:-1]]
    return [Segment(whole[a:b], flag) for (a, b), flag in zip(pairwise(ends), flags, strict=True)]


def preview(section: "Data", encoder: Encoder, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The first `count` usable rows as JSON objects: where, input_ids, labels (before the shift), segments.

    Rows above max_length are shown as the run would use them: cut, or left out.
    """
    return [as_json(example, encoder) for example in islice(_examples(section, encoder, seed), count)]


def as_json(example: Example, encoder: Encoder) -> dict[str, Any]:
    """One example as `qlora preview --json` gives it."""
    return {
        "where": example.where,
        "input_ids": example.input_ids.tolist(),
        "labels": example.labels.tolist(),
        "segments": [{"text": part.text, "trained": part.trained} for part in segments(example, encoder)],
    }


def _examples(section: "Data", encoder: Encoder, seed: int) -> Iterator[Example]:
    for index, one in enumerate(section.train):
        rows = source.read(one, locate(one), (seed, index))
        for _, made in encoded_rows(rows, one.format or section.format, encoder, chunk_rows=_AT_ONCE):
            if isinstance(made, Encoded) and (example := _fitting(made.example, section)) is not None:
                yield example


def _fitting(example: Example, section: "Data") -> Example | None:
    if len(example) <= section.max_length:
        return example
    short = Example(example.where, example.input_ids[: section.max_length], example.labels[: section.max_length])
    return short if section.overlong == "truncate" and short.trained_tokens() else None
