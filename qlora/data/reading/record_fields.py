"""Fields of a record with their types checked, shared by the formats."""

import json
from collections.abc import Mapping
from typing import Any

from qlora.data.types import TOOLS, Message, RecordError
from qlora.errors import did_you_mean

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


def text(fields: Mapping[str, Any], name: str, location: str = "") -> str:
    """The string in field `name`. RecordError if it is missing, null or of another type. location: `message 3: `."""
    if name not in fields:
        raise RecordError("missing field", f"{location}{name}")
    if fields[name] is None:
        raise RecordError("null field", f"{location}{name}")
    if not isinstance(fields[name], str):
        raise RecordError("wrong type", f"{location}{name} is {type(fields[name]).__name__}, a string is expected")
    return str(fields[name])


def optional_text(fields: Mapping[str, Any], name: str) -> str:
    """The string in field `name`; empty if it is missing or null."""
    return "" if fields.get(name) is None else text(fields, name)


def role(name: Any, location: str) -> str:
    """The chat template's name for the role `name`. RecordError for an unknown one."""
    if not isinstance(name, str) or name not in ROLES:
        raise RecordError("unknown role", f"{location}{name!r}.{did_you_mean(str(name), ROLES)}")
    return ROLES[name]


def content(value: Any, location: str) -> str:
    """The content of a message: a string or a list of text parts. RecordError for images and other types."""
    if value is None:
        raise RecordError("null field", f"{location}content")
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RecordError("wrong type", f"{location}content is {type(value).__name__}, a string is expected")
    return "".join(_part(part, location) for part in value)


def _part(part: Any, location: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RecordError("not text", f"{location}a content part is {kind!r}; only text can be trained")


def tools(fields: Mapping[str, Any]) -> list[Message]:
    """The tools column, a list or its JSON text, as one TOOLS message; empty if there are no tools."""
    value = fields.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RecordError("wrong type", "tools is a string that is not JSON") from None
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise RecordError("wrong type", "tools must be a list of JSON schemas")
    return [Message(TOOLS, "", extra={"tools": value})]


def require_answers(messages: list[Message]) -> list[Message]:
    """`messages`. RecordError if an assistant message is empty: the model would learn to answer nothing."""
    for number, message in enumerate(messages, 1):
        if message.role == "assistant" and not message.content.strip() and not message.extra.get("tool_calls"):
            raise RecordError("empty answer", f"message {number}")
    return messages
