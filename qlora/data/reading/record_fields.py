"""What formats share: reading one field of a row with its type checked, and turns as (role, content) pairs."""

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


def text(fields: Mapping[str, Any], name: str, place: str = "") -> str:
    """The string in field `name`. RowError if it is missing, null or something else."""
    if name not in fields:
        raise RecordError("missing field", f"{place}{name}")
    if fields[name] is None:
        raise RecordError("null field", f"{place}{name}")
    if not isinstance(fields[name], str):
        raise RecordError("wrong type", f"{place}{name} is {type(fields[name]).__name__}, a string is expected")
    return str(fields[name])


def optional_text(fields: Mapping[str, Any], name: str) -> str:
    """The string in field `name`, or nothing where it is missing or null."""
    return "" if fields.get(name) is None else text(fields, name)


def role(name: Any, place: str) -> str:
    """The chat template's word for the role `name`. RowError for an unknown one."""
    if not isinstance(name, str) or name not in ROLES:
        raise RecordError("unknown role", f"{place}{name!r}.{did_you_mean(str(name), ROLES)}")
    return ROLES[name]


def content(value: Any, place: str) -> str:
    """A message's content: a string, or the texts of a list of text parts. RowError for images and the like."""
    if value is None:
        raise RecordError("null field", f"{place}content")
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RecordError("wrong type", f"{place}content is {type(value).__name__}, a string is expected")
    return "".join(_part(part, place) for part in value)


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RecordError("not text", f"{place}a content part is {kind!r}; only text can be trained")


def tools(fields: Mapping[str, Any]) -> list[Message]:
    """The tools column, a list or its JSON text, as one leading message; none where there are no tools."""
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


def answered(messages: list[Message]) -> list[Message]:
    """`messages` if every assistant turn says something. RowError for an empty one: it would teach silence."""
    for number, message in enumerate(messages, 1):
        if message.role == "assistant" and not message.content.strip() and not message.extra.get("tool_calls"):
            raise RecordError("empty answer", f"message {number}")
    return messages
