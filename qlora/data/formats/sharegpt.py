"""conversations: [{from, value}] (+ system, tools): human and gpt turns, tool calls and their observations."""

import json
from collections.abc import Mapping
from typing import Any

from qlora.data.formats.messages import conversation
from qlora.data.reading import record_fields
from qlora.data.types import Message, Record, RecordError


class Sharegpt:
    """Rows of ShareGPT's columns; role/content spellings inside `conversations` are read as well."""

    def matches(self, fields: Mapping[str, Any]) -> bool:
        """Whether the columns are those of this format."""
        return "conversations" in fields

    def messages(self, row: Record) -> list[Message]:
        """The turns of `row`, the system column first. RowError if one can't be read."""
        system = record_fields.optional_text(row.fields, "system")
        value = row.fields.get("conversations")
        spelt = [_spelt(item) for item in value] if isinstance(value, list) else value
        turns = [_called(message) for message in conversation(spelt, "conversations")]
        head = [Message("system", system)] if system else []
        return record_fields.answered([*record_fields.tools(row.fields), *head, *turns])


def _spelt(item: Any) -> Any:
    """A {from, value} object in OpenAI's words; a function call keeps a mark of its own until it is read."""
    if not isinstance(item, Mapping) or "from" not in item:
        return item
    rest = {key: value for key, value in item.items() if key not in ("from", "value", "weight")}
    if "value" in item:
        rest["content"] = item["value"]
    mark = {"function_call": True} if item["from"] == "function_call" else {}
    return {**rest, **mark, "role": item["from"], "train": item.get("train", _weight(item.get("weight")))}


def _weight(value: Any) -> bool | None:
    return None if value is None else bool(value)


def _called(message: Message) -> Message:
    """A function_call turn as the tool_calls that chat templates read."""
    if "function_call" not in message.extra or message.extra["function_call"] is not True:
        return message
    try:
        call = json.loads(message.content)
    except (ValueError, RecursionError):
        raise RecordError("wrong type", "a function_call's value is not JSON") from None
    calls = [{"type": "function", "function": one} for one in (call if isinstance(call, list) else [call])]
    if not all(isinstance(one["function"], dict) and isinstance(one["function"].get("name"), str) for one in calls):
        raise RecordError("wrong type", "a function_call needs a name and arguments")
    extra = {key: value for key, value in message.extra.items() if key != "function_call"}
    return Message("assistant", "", message.train, {**extra, "tool_calls": calls})
