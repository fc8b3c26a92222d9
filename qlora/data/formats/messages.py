"""The messages format: messages: [{role, content}] (+ tools, system)."""

from collections.abc import Mapping
from typing import Any

from qlora.data.reading import loss_keys, record_fields
from qlora.data.reading.tool_calls import tool_calls, tools
from qlora.data.types import Message, Record, RecordError

_READ_KEYS = frozenset(
    ("role", "content", "tool_calls", "function_call", *loss_keys.MESSAGE_KEYS, *loss_keys.PART_KEYS)
)
_TURN_KEYS = {"role", "content"}


class Messages:
    """Records with the columns of OpenAI's chat format; a loss key (train: false, weight: 0, ...) masks a message."""

    def matches(self, fields: Mapping[str, Any]) -> bool:
        """Whether the columns are those of this format."""
        return "messages" in fields

    def messages(self, record: Record) -> list[Message]:
        """The messages of `record`. RecordError if one can't be read."""
        messages = record_fields.system(record.fields, parse_messages(record.fields.get("messages"), "messages"))
        return record_fields.require_answers([*tools(record.fields), *messages])


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
    """One message. Keys that are not read here are extra, and passed to the chat template."""
    if not isinstance(item, Mapping):
        raise RecordError("wrong type", f"{location}{type(item).__name__}, an object is expected")
    if "role" not in item:
        raise RecordError("missing field", f"{location}role")
    role = record_fields.role(item["role"], location)
    if item.keys() == _TURN_KEYS and isinstance(item["content"], str):  # the usual case
        return Message(role, item["content"])
    extra = {key: value for key, value in item.items() if key not in _READ_KEYS and value is not None}
    calls = tool_calls(item, location)
    if calls:
        extra["tool_calls"] = calls
    has_calls = role == "assistant" and bool(calls)
    if "content" not in item and not has_calls:
        raise RecordError("missing field", f"{location}content")
    content = "" if has_calls and item.get("content") is None else record_fields.content(item["content"], location)
    return Message(role, content, loss_keys.message_flag(item, location), extra)
