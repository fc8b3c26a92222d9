"""messages: [{role, content}] (+ tools): the turns as they are."""

from collections.abc import Mapping
from typing import Any

from qlora.data.reading import record_fields
from qlora.data.types import Message, Record, RecordError

_OURS = ("role", "content", "train")


class Messages:
    """Rows of OpenAI's chat columns; `train: false` on a message keeps it out of the loss."""

    def matches(self, fields: Mapping[str, Any]) -> bool:
        """Whether the columns are those of this format."""
        return "messages" in fields

    def messages(self, row: Record) -> list[Message]:
        """The turns of `row`. RowError if one can't be read."""
        turns = conversation(row.fields.get("messages"), "messages")
        return record_fields.answered([*record_fields.tools(row.fields), *turns])


def conversation(value: Any, name: str) -> list[Message]:
    """The list of {role, content} objects in field `name` as messages. RowError, with the message's number."""
    if value is None:
        raise RecordError("null field" if name else "missing field", name)
    if not isinstance(value, list):
        raise RecordError("wrong type", f"{name} is {type(value).__name__}, a list of messages is expected")
    if not value:
        raise RecordError("no messages", name)
    return [_message(item, f"message {number}: ") for number, item in enumerate(value, 1)]


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, Mapping):
        raise RecordError("wrong type", f"{place}{type(item).__name__}, an object is expected")
    if "role" not in item:
        raise RecordError("missing field", f"{place}role")
    role = record_fields.role(item["role"], place)
    extra = {key: value for key, value in item.items() if key not in _OURS and value is not None}
    calls = role == "assistant" and bool(extra.get("tool_calls"))
    if "content" not in item and not calls:
        raise RecordError("missing field", f"{place}content")
    said = "" if calls and item.get("content") is None else record_fields.content(item["content"], place)
    return Message(role, said, _train(item.get("train"), place), extra)


def _train(value: Any, place: str) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise RecordError("wrong type", f"{place}train is {type(value).__name__}, true or false is expected")
    return value
