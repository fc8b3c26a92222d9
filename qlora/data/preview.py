"""A preview of the training examples: their text in segments, each trained or not."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora.data.batching.filter import split_overlong, truncate
from qlora.data.conversations.build_example import Encoded
from qlora.data.conversations.encode_records import encode_records
from qlora.data.conversations.encoder import Encoder
from qlora.data.reading import source
from qlora.data.reading.resolve_paths import resolve_source
from qlora.data.types import IGNORED, Example

if TYPE_CHECKING:
    from qlora.data import Data


_CHUNK_RECORDS = 16  # records encoded together: a preview shows a few


@dataclass(frozen=True)
class Segment:
    """A run of text whose tokens are all trained, or all not."""

    text: str
    trained: bool


def segments(example: Example, encoder: Encoder) -> list[Segment]:
    """The decoded text of `example`, split where training begins and ends."""
    trained = example.labels != IGNORED
    bounds = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(example)]
    text = encoder.decode(example.input_ids)
    ends = [0]
    for bound in bounds[1:-1]:
        # A character of several tokens belongs to the segment that completes it.
        prefix = encoder.decode(example.input_ids[:bound]).rstrip("\ufffd")
        ends.append(max(ends[-1], len(prefix) if text.startswith(prefix) else ends[-1]))
    ends.append(len(text))
    flags = [bool(trained[bound]) for bound in bounds[:-1]]
    return [Segment(text[start:end], flag) for (start, end), flag in zip(pairwise(ends), flags, strict=True)]


def preview(section: "Data", encoder: Encoder, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The first `count` usable examples as JSON objects: where, input_ids, labels (before the shift), segments.

    Examples above max_length are split, truncated or left out, as in training.
    """
    return [as_json(example, encoder) for example in islice(_examples(section, encoder, seed), count)]


def as_json(example: Example, encoder: Encoder) -> dict[str, Any]:
    """An example as an object of `qlora preview --json`."""
    return {
        "where": example.where,
        "input_ids": example.input_ids.tolist(),
        "labels": example.labels.tolist(),
        "segments": [{"text": part.text, "trained": part.trained} for part in segments(example, encoder)],
    }


def _examples(section: "Data", encoder: Encoder, seed: int) -> Iterator[Example]:
    for index, item in enumerate(section.train):
        records = source.read_records(item, resolve_source(item), (seed, index))
        kind = item.format or section.format
        for _, result in encode_records(records, kind, encoder, chunk_records=_CHUNK_RECORDS):
            if isinstance(result, Encoded):
                yield from _fitting(result, section)


def _fitting(encoded: Encoded, section: "Data") -> list[Example]:
    """The example, its pieces or its beginning; empty if it is dropped."""
    if len(encoded.example) <= section.max_length:
        return [encoded.example]
    if pieces := split_overlong(encoded, section):
        return pieces
    short = truncate(encoded.example, section.max_length)
    return [short] if section.overlong == "truncate" and short.trained_tokens() else []
