"""The tokens format: input_ids, labels: records that are tokenized already. Without labels every token is trained.

In place of labels a record may have masks with 1 for each trained token (loss_mask, completion_mask, assistant_masks).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qlora.data.reading.loss_keys import TOKEN_KEYS, flag_of
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
        labels = _masked(record.fields, ids, labels)
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


def _masked(fields: Mapping[str, Any], ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The labels of tokens that every mask of the record trains. RecordError if a mask contradicts written labels."""
    for key in (key for key in TOKEN_KEYS if fields.get(key) is not None):
        value = fields[key]
        if not isinstance(value, list) or len(value) != len(ids):
            mask = f"{len(value)} flags" if isinstance(value, list) else type(value).__name__
            raise RecordError("loss mask does not fit", f"{key}: {mask} for {len(ids)} input_ids")
        trained = np.array([flag_of(flag, f"{key}[{number}]") for number, flag in enumerate(value)], dtype=bool)
        if fields.get("labels") is not None and (labels[~trained] != IGNORED).any():
            raise RecordError("contradictory loss keys", f"labels train a token that {key} masks. Keep one of them")
        labels = np.where(trained, labels, np.int32(IGNORED))
    return labels


def _integers(fields: Mapping[str, Any], name: str) -> np.ndarray:
    value = fields.get(name)
    if value is None:
        raise RecordError("null field" if name in fields else "missing field", name)
    if not isinstance(value, list) or any(type(number) is not int for number in value):
        raise RecordError("wrong type", f"{name} must be a list of integers")
    if any(not -(2**31) <= number < 2**31 for number in value):
        raise RecordError("wrong type", f"{name} has a number that is not a token id")
    return np.array(value, dtype=np.int32)
