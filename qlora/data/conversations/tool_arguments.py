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


def with_fitting_arguments(conversation: Conversation, template: Template, prompt: bool) -> Conversation | None:
    """`conversation` with all arguments as objects or all as text, whichever is written; None if neither is.

    A template that writes the same JSON for both gets the form of the record.
    """
    arguments = _arguments(conversation)
    if not any(isinstance(_as_object(value), Mapping) for value in arguments):
        return conversation
    objects, texts = (_converted(conversation, form) for form in (_as_object, _as_text))
    as_objects, as_texts = (_rendered(variant, template, prompt) for variant in (objects, texts))
    if as_objects is None:
        return None if as_texts is None else texts
    same = as_texts is not None and without_whitespace(as_objects) == without_whitespace(as_texts)
    return texts if same and all(isinstance(value, str) for value in arguments) else objects


def _functions(conversation: Conversation) -> Iterator[Mapping[str, Any]]:
    for turn in conversation.turns:
        for call in turn.get("tool_calls") or ():
            yield call.get("function", call)


def _arguments(conversation: Conversation) -> list[Any]:
    return [function.get("arguments") for function in _functions(conversation)]


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


def _rendered(conversation: Conversation, template: Template, prompt: bool) -> str | None:
    """The rendering, if it has every call's arguments: a text as it is, an object by its keys and texts."""
    try:
        rendered = template.render(conversation.turns, conversation.tools, prompt)
    except RecordError:
        return None
    dense = without_whitespace(rendered)
    return rendered if all(_has(rendered, dense, value) for value in _arguments(conversation)) else None


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
