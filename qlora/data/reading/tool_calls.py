"""Tools and tool calls of a record as chat templates read them: lists of objects, also where the file has JSON text."""

import json
from collections.abc import Mapping
from typing import Any

from qlora.data.types import TOOLS, Message, RecordError


def tools(fields: Mapping[str, Any]) -> list[Message]:
    """The tools column, a list or its JSON text, as one TOOLS message; empty if there are no tools.

    `functions`, OpenAI's older name, holds the functions alone.
    """
    value = parsed(fields.get("tools"), "tools")
    functions = parsed(fields.get("functions"), "functions") if not value else None
    if functions:
        value = [{"type": "function", "function": function} for function in _objects(functions, "functions")]
    return [Message(TOOLS, "", extra={"tools": _objects(value, "tools")})] if value else []


def _objects(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise RecordError("wrong type", f"{name} must be a list of JSON schemas")
    return value


def tool_calls(item: Mapping[str, Any], location: str) -> list[Any]:
    """The tool calls of a message: `tool_calls`, or the one call of OpenAI's older `function_call`."""
    value = parsed(item.get("tool_calls"), f"{location}tool_calls")
    legacy = parsed(item.get("function_call"), f"{location}function_call")
    if isinstance(legacy, Mapping) and not value:
        value = [{"type": "function", "function": legacy}]
    if not value:
        return []
    calls = [value] if isinstance(value, Mapping) else value
    if not isinstance(calls, list):
        raise RecordError("wrong type", f"{location}tool_calls is {type(value).__name__}, a list of calls is expected")
    return [_call(call, f"{location}tool call {number}") for number, call in enumerate(calls, 1)]


def _call(call: Any, name: str) -> Any:
    """A call with its name where templates expect it. RecordError if it has none."""
    function = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(function, Mapping):
        raise RecordError("wrong type", f"{name} is {type(function).__name__}, an object with a name is expected")
    if not isinstance(function.get("name"), str):
        raise RecordError("wrong type", f"{name} has no name; an object with a name is expected")
    return call


def parsed(value: Any, name: str) -> Any:
    """`value`, read as JSON if it is a text. RecordError for a text that is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise RecordError("wrong type", f"{name} is a string that is not JSON") from None
