"""instruction, input, output (+ system, history): one user turn and one assistant turn, earlier pairs before them."""

from collections.abc import Mapping
from typing import Any

from qlora.data.reading import record_fields
from qlora.data.types import Message, Record, RecordError


class Alpaca:
    """Rows of Stanford Alpaca's columns."""

    def matches(self, fields: Mapping[str, Any]) -> bool:
        """Whether the columns are those of this format."""
        return "instruction" in fields and "output" in fields

    def messages(self, row: Record) -> list[Message]:
        """The turns of `row`; `input` follows the instruction after a blank line. RowError if one can't be read."""
        instruction = record_fields.text(row.fields, "instruction")
        context = record_fields.optional_text(row.fields, "input")
        system = record_fields.optional_text(row.fields, "system")
        return record_fields.answered(
            [
                *([Message("system", system)] if system else []),
                *_history(row.fields.get("history")),
                Message("user", f"{instruction}\n\n{context}" if context else instruction),
                Message("assistant", record_fields.text(row.fields, "output")),
            ]
        )


def _history(pairs: Any) -> list[Message]:
    if pairs is None:
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise RecordError("wrong type", "history must be a list of [question, answer] pairs")
    turns = []
    for number, (question, answer) in enumerate(pairs, 1):
        pair = {"question": question, "answer": answer}
        turns.append(Message("user", record_fields.text(pair, "question", f"history {number}: ")))
        turns.append(Message("assistant", record_fields.text(pair, "answer", f"history {number}: ")))
    return turns
