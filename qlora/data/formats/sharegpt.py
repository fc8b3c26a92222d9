"""The sharegpt format: conversations: [{from, value}] (+ system, tools), tool calls included."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qlora.data.formats.messages import parse_messages
from qlora.data.reading import record_fields
from qlora.data.reading.tool_calls import tools
from qlora.data.types import Message, Record, RecordError

_CALL = "qlora_function_call"  # marks a message whose content is a call


class Sharegpt:
    """Records with the columns of ShareGPT; role and content in place of from and value are read too."""

    def matches(self, fields: Mapping[str, Any]) -> bool:
        """Whether the columns are those of this format."""
        return "conversations" in fields

    def messages(self, record: Record) -> list[Message]:
        """The messages of `record`, the system column first. RecordError if one can't be read."""
        value = record.fields.get("conversations")
        items = [_openai_keys(item) for item in value] if isinstance(value, list) else value
        messages = [_with_tool_calls(message) for message in parse_messages(items, "conversations")]
        messages = record_fields.system(record.fields, messages)
        return record_fields.require_answers([*tools(record.fields), *messages])


def _openai_keys(item: Any) -> Any:
    """A {from, value} object with OpenAI's keys. A function call gets the key _CALL, read below."""
    if not isinstance(item, Mapping) or "from" not in item:
        return item
    rest = {key: value for key, value in item.items() if key not in ("from", "value")}
    if "value" in item:
        rest["content"] = item["value"]
    return {**rest, **({_CALL: True} if item["from"] == "function_call" else {}), "role": item["from"]}


def _with_tool_calls(message: Message) -> Message:
    """A function_call message with the tool_calls that chat templates read."""
    if _CALL not in message.extra:
        return message
    try:
        call = json.loads(message.content)
    except (ValueError, RecursionError):
        raise RecordError("wrong type", "a function_call's value is not JSON") from None
    functions = call if isinstance(call, list) else [call]
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
        raise RecordError("wrong type", "a function_call needs a name and arguments")
    calls = [{"type": "function", "function": function} for function in functions]
    extra = {key: value for key, value in message.extra.items() if key != _CALL}
    return replace(message, role="assistant", content="", extra={**extra, "tool_calls": calls})
