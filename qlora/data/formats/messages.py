"""The messages format: messages: [{role, content}] (+ tools)."""

from collections.abc import Mapping
from typing import Any

from qlora.data.reading import record_fields
from qlora.data.types import Message, Record, RecordError

_KEYS = ("role", "content", "train")  # all others are passed to the chat template


class Messages:
    """Records with the columns of OpenAI's chat format; a message with `train: false` bears no loss."""

    def matches(self, fields: Mapping[str, Any]) -> bool:
        """Whether the columns are those of this format."""
        return "messages" in fields

    def messages(self, record: Record) -> list[Message]:
        """The messages of `record`. RecordError if one can't be read."""
        messages = parse_messages(record.fields.get("messages"), "messages")
        return record_fields.require_answers([*record_fields.tools(record.fields), *messages])


def parse_messages(value: Any, name: str) -> list[Message]:
    """The list of {role, content} objects in field `name` as messages. RecordError with the message's number."""
    if value is None:
        raise RecordError("null field" if name else "missing field", name)
    if not isinstance(value, list):
        raise RecordError("wrong type", f"{name} is {type(value).__name__}, a list of messages is expected")
    if not value:
        raise RecordError("no messages", name)
    return [_message(item, f"message {number}: ") for number, item in enumerate(value, 1)]


def _message(item: Any, location: str) -> Message:
    if not isinstance(item, Mapping):
        raise RecordError("wrong type", f"{location}{type(item).__name__}, an object is expected")
    if "role" not in item:
        raise RecordError("missing field", f"{location}role")
    role = record_fields.role(item["role"], location)
    extra = {key: value for key, value in item.items() if key not in _KEYS and value is not None}
    calls = role == "assistant" and bool(extra.get("tool_calls"))
    if "content" not in item and not calls:
        raise RecordError("missing field", f"{location}content")
    content = "" if calls and item.get("content") is None else record_fields.content(item["content"], location)
    return Message(role, content, _train(item.get("train"), location), extra)


def _train(value: Any, location: str) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise RecordError("wrong type", f"{location}train is {type(value).__name__}, true or false is expected")
    return value
