"""The tokens format: input_ids, labels: records that are tokenized already. Without labels every token is trained."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qlora.data.types import IGNORED, TOKENS, Message, Record, RecordError


class Tokens:
    """Records of token ids. Positions that attention_mask marks as padding are removed."""

    def matches(self, fields: Mapping[str, Any]) -> bool:
        """Whether the columns are those of this format."""
        return "input_ids" in fields

    def messages(self, record: Record) -> list[Message]:
        """One TOKENS message. RecordError if ids and labels are not integers, or differ in length or value."""
        ids = _integers(record.fields, "input_ids")
        labels = _integers(record.fields, "labels") if record.fields.get("labels") is not None else ids
        if len(labels) != len(ids):
            raise RecordError("labels don't fit", f"{len(labels)} labels for {len(ids)} input_ids")
        if record.fields.get("attention_mask") is not None:
            mask = _integers(record.fields, "attention_mask")
            if len(mask) != len(ids):
                raise RecordError("labels don't fit", f"{len(mask)} in attention_mask for {len(ids)} input_ids")
            ids, labels = ids[mask != 0], labels[mask != 0]
        if not len(ids):
            raise RecordError("empty text", "no input_ids")
        if ((labels != IGNORED) & (labels != ids)).any():
            raise RecordError("labels don't fit", "a label must be -100 or the token at its position")
        return [Message(TOKENS, "", True, {"input_ids": ids, "labels": labels})]


def _integers(fields: Mapping[str, Any], name: str) -> np.ndarray:
    value = fields.get(name)
    if value is None:
        raise RecordError("null field" if name in fields else "missing field", name)
    if not isinstance(value, list) or any(type(number) is not int for number in value):
        raise RecordError("wrong type", f"{name} must be a list of integers")
    if any(not -(2**31) <= number < 2**31 for number in value):
        raise RecordError("wrong type", f"{name} has a number that is not a token id")
    return np.array(value, dtype=np.int32)
