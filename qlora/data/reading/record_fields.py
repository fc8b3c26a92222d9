"""Fields of a record with their types checked, shared by the formats."""

from collections.abc import Mapping
from typing import Any

from qlora.data.types import Message, RecordError
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

TEXT_PARTS = ("text", "input_text", "output_text")  # types of a content part that holds text


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
    """The text of a content part: a string, or an object with the text under `text` or `value`."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if not isinstance(part, Mapping) or kind not in TEXT_PARTS:
        raise RecordError("not text", f"{location}a content part is {kind!r}; only text can be trained")
    texts = [part[key] for key in ("text", "value") if part.get(key) is not None]
    if len(texts) != 1 or not isinstance(texts[0], str):
        keys = ", ".join(map(str, part))
        raise RecordError("not text", f"{location}a text part has the keys {keys}; one text under `text` is expected")
    return str(texts[0])


def system(fields: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """`messages` after the text of the system column. RecordError if they start with another system text."""
    text_of_column = optional_text(fields, "system")
    if not text_of_column.strip():
        return messages
    first = messages[0] if messages and messages[0].role == "system" else None
    if first and first.content != text_of_column:
        raise RecordError("two system texts", "the system column differs from the first message. Keep one of them")
    return messages if first else [Message("system", text_of_column), *messages]


def require_answers(messages: list[Message]) -> list[Message]:
    """`messages`. RecordError if an assistant message is empty: the model would learn to answer nothing."""
    for number, message in enumerate(messages, 1):
        if message.role == "assistant" and not message.content.strip() and not message.extra.get("tool_calls"):
            raise RecordError("empty answer", f"message {number}")
    return messages
