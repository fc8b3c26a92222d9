"""Messages as chat templates read them: plain objects, forged control strings broken, and which turns to train."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.data.conversations.chat_template import Turn
from qlora.data.conversations.safe_tokenizer import SafeTokenizer
from qlora.data.types import TOOLS, Message, RecordError

MAX_TURNS = 512  # every answer's prompt is rendered: the cost grows with the square

Guarded = tuple[list[Turn], str, tuple[str, ...]]  # turns, the character that breaks, what was found


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation ready to render: `turns` as templates read them, control strings of the data broken by `mark`."""

    turns: list[Turn]
    tools: Sequence[Any] | None
    wanted: tuple[bool, ...]  # which turns are to be trained
    mark: str
    forged: tuple[str, ...]


def chat_of(messages: Sequence[Message], train_on: str, tokeniser: SafeTokenizer) -> Conversation:
    """`messages` as template turns, with the turns that `train_on` and the messages' own `train` ask for."""
    tools = next((list(m.extra["tools"]) for m in messages if m.role == TOOLS), None)
    said = [message for message in messages if message.role != TOOLS]
    if not 0 < len(said) <= MAX_TURNS:
        raise RecordError("too many turns" if said else "no messages", f"{len(said)} turns, at most {MAX_TURNS}")
    last = max((i for i, message in enumerate(said) if message.role == "assistant"), default=-1)
    wanted = tuple(_wanted(message, train_on, i == last) for i, message in enumerate(said))
    values = [{"role": m.role, "content": m.content, **m.extra} for m in said]
    assistant = [m.role == "assistant" for m in said]
    (*turns, schemas), mark, forged = _guarded([*values, {"tools": tools}], [*assistant, False], tokeniser)
    return Conversation(turns, schemas["tools"], wanted, mark, forged)


def _wanted(message: Message, train_on: str, is_last: bool) -> bool:
    if message.role != "assistant" or message.train is False:
        return False
    return is_last or train_on != "last" or message.train is True


def _guarded(values: list[dict[str, Any]], assistant: list[bool], tokeniser: SafeTokenizer) -> Guarded:
    """Break forged control strings in all the strings of `values`, nested ones included."""
    found: list[tuple[str, bool]] = []
    for value, mine in zip(values, assistant, strict=True):
        _collect(value, mine, found)
    texts, mark, forged = tokeniser.guard([text for text, _ in found], [mine for _, mine in found])
    if not forged:
        return list(values), "", ()
    queue = iter(texts)
    return [_replace(value, queue) for value in values], mark, forged


def _collect(value: Any, mine: bool, found: list[tuple[str, bool]]) -> None:
    if isinstance(value, str):
        found.append((value, mine))
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect(item, mine, found)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect(item, mine, found)


def _replace(value: Any, texts: Iterator[str]) -> Any:
    if isinstance(value, str):
        return next(texts)
    if isinstance(value, Mapping):
        return {key: _replace(item, texts) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace(item, texts) for item in value]
    return value
