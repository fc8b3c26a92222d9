"""Messages as a conversation that a chat template renders: plain objects, control strings broken, answers to train."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.data.conversations.chat_template import Turn
from qlora.data.conversations.safe_tokenizer import SafeTokenizer
from qlora.data.types import TOOLS, Message, RecordError

MAX_TURNS = 512  # every answer's prompt is rendered: the cost grows with the square


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation ready to render. `break_char` breaks the control strings of the record's text."""

    turns: list[Turn]
    tools: Sequence[Any] | None
    trained: tuple[bool, ...]  # whether each turn is to be trained
    masked: tuple[bool, ...]  # whether each turn's record says that it bears no loss, also under train_on: all
    break_char: str
    control_strings: tuple[str, ...]


def build_conversation(messages: Sequence[Message], train_on: str, tokenizer: SafeTokenizer) -> Conversation:
    """`messages` as template turns. `train_on` and the messages' own `train` decide which turns are trained."""
    tools = next((list(m.extra["tools"]) for m in messages if m.role == TOOLS), None)
    dialog = [message for message in messages if message.role != TOOLS]
    if not 0 < len(dialog) <= MAX_TURNS:
        raise RecordError("too many turns" if dialog else "no messages", f"{len(dialog)} turns, at most {MAX_TURNS}")
    last = max((i for i, message in enumerate(dialog) if message.role == "assistant"), default=-1)
    trained = tuple(_is_trained(message, train_on, i == last) for i, message in enumerate(dialog))
    masked = tuple(message.train is False for message in dialog)
    if train_on == "all":
        _require_separable(dialog)
    values = [{"role": m.role, "content": m.content, **m.extra} for m in dialog]
    by_assistant = [m.role == "assistant" for m in dialog]
    broken = _break_control_strings([*values, {"tools": tools}], [*by_assistant, False], tokenizer)
    (*turns, schemas), break_char, control_strings = broken
    return Conversation(turns, schemas["tools"], trained, masked, break_char, control_strings)


def _is_trained(message: Message, train_on: str, is_last: bool) -> bool:
    if message.role != "assistant" or message.train is False:
        return False
    if message.prompt and train_on != "all":
        return message.train is True
    return is_last or train_on != "last" or message.train is True


def _require_separable(dialog: Sequence[Message]) -> None:
    """RecordError for a masked message that can't be separated from its prompt, which is to be trained."""
    number = next((i for i, m in enumerate(dialog, 1) if m.train is False and m.role != "assistant"), None)
    if number:
        problem = f"message {number} ({dialog[number - 1].role}) is masked, and data.train_on: all trains every prompt"
        raise RecordError("loss mask not applied", f"{problem}. Set data.train_on: assistant, or remove the key")


def _break_control_strings(
    values: list[dict[str, Any]], by_assistant: list[bool], tokenizer: SafeTokenizer
) -> tuple[list[Turn], str, tuple[str, ...]]:
    """Break the control strings in all strings of `values`, nested ones included.

    Returns the new values, the character that breaks, and the control strings.
    """
    strings: list[tuple[str, bool]] = []
    for value, flag in zip(values, by_assistant, strict=True):
        for item in value.values():
            if isinstance(item, str):
                strings.append((item, flag))
            elif item is not None:
                _collect_strings(item, flag, strings)
    texts, break_char, control_strings = tokenizer.break_control_strings(
        [text for text, _ in strings], [flag for _, flag in strings]
    )
    if not control_strings:
        return list(values), "", ()
    queue = iter(texts)
    return [_replace_strings(value, queue) for value in values], break_char, control_strings


def _collect_strings(value: Any, by_assistant: bool, strings: list[tuple[str, bool]]) -> None:
    if isinstance(value, str):
        strings.append((value, by_assistant))
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect_strings(item, by_assistant, strings)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect_strings(item, by_assistant, strings)


def _replace_strings(value: Any, texts: Iterator[str]) -> Any:
    if isinstance(value, str):
        return next(texts)
    if isinstance(value, Mapping):
        return {key: _replace_strings(item, texts) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_strings(item, texts) for item in value]
    return value
