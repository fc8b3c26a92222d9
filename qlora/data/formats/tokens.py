"""input_ids, labels: rows that are tokenised already; without labels every token is trained."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qlora.data.types import IGNORED, TOKENS, Message, Record, RecordError


class Tokens:
    """Rows of token ids. Positions that attention_mask calls padding are left out."""

    def matches(self, fields: Mapping[str, Any]) -> bool:
        """Whether the columns are those of this format."""
        return "input_ids" in fields

    def messages(self, row: Record) -> list[Message]:
        """One message with the ids and labels. RowError if they are no whole numbers or don't belong together."""
        ids = _whole_numbers(row.fields, "input_ids")
        labels = _whole_numbers(row.fields, "labels") if row.fields.get("labels") is not None else ids
        if len(labels) != len(ids):
            raise RecordError("labels don't fit", f"{len(labels)} labels for {len(ids)} input_ids")
        if row.fields.get("attention_mask") is not None:
            mask = _whole_numbers(row.fields, "attention_mask")
            if len(mask) != len(ids):
                raise RecordError("labels don't fit", f"{len(mask)} in attention_mask for {len(ids)} input_ids")
            ids, labels = ids[mask != 0], labels[mask != 0]
        if not len(ids):
            raise RecordError("empty text", "no input_ids")
        if ((labels != IGNORED) & (labels != ids)).any():
            raise RecordError("labels don't fit", "a label is either -100 or the token at the same place")
        return [Message(TOKENS, "", True, {"input_ids": ids, "labels": labels})]


def _whole_numbers(fields: Mapping[str, Any], name: str) -> np.ndarray:
    value = fields.get(name)
    if value is None:
        raise RecordError("null field" if name in fields else "missing field", name)
    if not isinstance(value, list) or any(type(number) is not int for number in value):
        raise RecordError("wrong type", f"{name} must be a list of whole numbers")
    if any(not -(2**31) <= number < 2**31 for number in value):
        raise RecordError("wrong type", f"{name} has a number that is no token id")
    return np.array(value, dtype=np.int32)
