"""The sharegpt format: conversations: [{from, value}] (+ system, tools), tool calls included."""

import json
from collections.abc import Mapping
from typing import Any

from qlora.data.formats.messages import parse_messages
from qlora.data.reading import record_fields
from qlora.data.types import Message, Record, RecordError


class Sharegpt:
    """Records with the columns of ShareGPT; role and content in place of from and value are read too."""

    def matches(self, fields: Mapping[str, Any]) -> bool:
        """Whether the columns are those of this format."""
        return "conversations" in fields

    def messages(self, record: Record) -> list[Message]:
        """The messages of `record`, the system column first. RecordError if one can't be read."""
        system = record_fields.optional_text(record.fields, "system")
        value = record.fields.get("conversations")
        items = [_openai_keys(item) for item in value] if isinstance(value, list) else value
        messages = [_with_tool_calls(message) for message in parse_messages(items, "conversations")]
        first = [Message("system", system)] if system else []
        return record_fields.require_answers([*record_fields.tools(record.fields), *first, *messages])


def _openai_keys(item: Any) -> Any:
    """A {from, value} object with OpenAI's keys. A function call gets the key function_call: true, read below."""
    if not isinstance(item, Mapping) or "from" not in item:
        return item
    rest = {key: value for key, value in item.items() if key not in ("from", "value", "weight")}
    if "value" in item:
        rest["content"] = item["value"]
    marker = {"function_call": True} if item["from"] == "function_call" else {}
    return {**rest, **marker, "role": item["from"], "train": item.get("train", _weight(item.get("weight")))}


def _weight(value: Any) -> bool | None:
    return None if value is None else bool(value)


def _with_tool_calls(message: Message) -> Message:
    """A function_call message with the tool_calls that chat templates read."""
    if "function_call" not in message.extra or message.extra["function_call"] is not True:
        return message
    try:
        call = json.loads(message.content)
    except (ValueError, RecursionError):
        raise RecordError("wrong type", "a function_call's value is not JSON") from None
    functions = call if isinstance(call, list) else [call]
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
        raise RecordError("wrong type", "a function_call needs a name and arguments")
    calls = [{"type": "function", "function": function} for function in functions]
    extra = {key: value for key, value in message.extra.items() if key != "function_call"}
    return Message("assistant", "", message.train, {**extra, "tool_calls": calls})
