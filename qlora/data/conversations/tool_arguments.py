"""Arguments of tool calls in the form that a chat template writes rightly: an object, or JSON text.

OpenAI's files hold text. A template that applies `tojson` would write it as a quoted string, and one that joins strings
would write an object as Python shows it. So both forms are rendered and compared.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from qlora.data.conversations.chat_messages import Conversation
from qlora.data.conversations.chat_template import Template
from qlora.data.conversations.safe_tokenizer import without_whitespace
from qlora.data.types import RecordError


def with_fitting_arguments(conversation: Conversation, template: Template, prompt: bool) -> Conversation:
    """`conversation` with all arguments as objects or all as text. RecordError if the template writes neither.

    A template that does not write the calls themselves is left to the loss mask, which refuses it.
    """
    arguments = _arguments(conversation)
    texts = any(isinstance(value, str) and isinstance(_as_object(value), dict) for value in arguments)
    objects = any(isinstance(value, Mapping) for value in arguments)
    if not texts and not objects:
        return conversation
    forms = [_as_object, _as_text] if objects else [_as_text, _as_object]  # the form of the record first
    variants = [_converted(conversation, form) for form in forms]
    for variant in variants:
        if _is_written(variant, template, prompt):
            return variant
    rendered = template.render(conversation.turns, conversation.tools, prompt)  # raises the template's own reason
    if not all(name in rendered for name in _names(conversation)):
        return conversation
    first = json.dumps(arguments[0], ensure_ascii=False)
    raise RecordError("the template does not write tool arguments", f"{first[:60]}, neither as text nor as an object")


def _functions(conversation: Conversation) -> Iterator[Mapping[str, Any]]:
    for turn in conversation.turns:
        for call in turn.get("tool_calls") or ():
            yield call.get("function", call)


def _arguments(conversation: Conversation) -> list[Any]:
    return [function.get("arguments") for function in _functions(conversation)]


def _names(conversation: Conversation) -> list[str]:
    return [str(function.get("name", "")) for function in _functions(conversation)]


def _as_object(value: Any) -> Any:
    """The object that a JSON text is; any other value unchanged. An empty text stands for no arguments."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value) if value.strip() else {}
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, dict) else value


def _as_text(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else value


def _converted(conversation: Conversation, form: Callable[[Any], Any]) -> Conversation:
    turns = [
        {**turn, "tool_calls": [_converted_call(call, form) for call in turn["tool_calls"]]}
        if turn.get("tool_calls")
        else turn
        for turn in conversation.turns
    ]
    return replace(conversation, turns=turns)


def _converted_call(call: Mapping[str, Any], form: Callable[[Any], Any]) -> Mapping[str, Any]:
    function = call.get("function", call)
    if "arguments" not in function:
        return call
    changed = {**function, "arguments": form(function["arguments"])}
    return {**call, "function": changed} if "function" in call else changed


def _is_written(conversation: Conversation, template: Template, prompt: bool) -> bool:
    """Whether the rendering has every call's arguments: a text as it is, an object by its keys and texts."""
    try:
        rendered = template.render(conversation.turns, conversation.tools, prompt)
    except RecordError:
        return False
    dense = without_whitespace(rendered)
    return all(_has(rendered, dense, value) for value in _arguments(conversation))


def _has(rendered: str, dense: str, value: Any) -> bool:
    if isinstance(value, str):
        quoted = (json.dumps(value), json.dumps(value, ensure_ascii=False))
        return value.strip() in rendered and not any(text in rendered for text in quoted)
    if not isinstance(value, Mapping):
        return True
    if str(value) in rendered and json.dumps(value, ensure_ascii=False) not in rendered:
        return False  # Python's notation, with single quotes
    return all(without_whitespace(text) in dense or _quoted(text) in dense for text in _texts(value))


def _quoted(text: str) -> str:
    return without_whitespace(json.dumps(text, ensure_ascii=False)[1:-1])


def _texts(value: Any) -> Iterator[str]:
    """The keys and texts of an object, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
