"""The alpaca format: instruction, input, output (+ system, tools, history with earlier turns)."""

from collections.abc import Mapping
from typing import Any

from qlora.data.reading import record_fields
from qlora.data.reading.tool_calls import tools
from qlora.data.types import Message, Record, RecordError


class Alpaca:
    """Records with the columns of Stanford Alpaca."""

    def matches(self, fields: Mapping[str, Any]) -> bool:
        """Whether the columns are those of this format."""
        return "instruction" in fields and "output" in fields

    def messages(self, record: Record) -> list[Message]:
        """The messages of `record`, with `input` below the instruction. RecordError if one can't be read."""
        instruction = record_fields.text(record.fields, "instruction")
        context = record_fields.optional_text(record.fields, "input")
        turns = [
            *_history(record.fields.get("history")),
            Message("user", f"{instruction}\n\n{context}" if context else instruction),
            Message("assistant", record_fields.text(record.fields, "output")),
        ]
        return record_fields.require_answers([*tools(record.fields), *record_fields.system(record.fields, turns)])


def _history(pairs: Any) -> list[Message]:
    if pairs is None:
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise RecordError("wrong type", "history must be a list of [question, answer] pairs")
    messages = []
    for number, (question, answer) in enumerate(pairs, 1):
        pair = {"question": question, "answer": answer}
        messages.append(Message("user", record_fields.text(pair, "question", f"history {number}: ")))
        messages.append(Message("assistant", record_fields.text(pair, "answer", f"history {number}: ")))
    return messages
