"""Which stretches of a rendered conversation the assistant must produce itself: found by prefix rendering, and proved.

The prompt that the template gives for the turns before an answer must be the beginning of the rendering with the
answer, and that, up to the end-of-turn token, the beginning of the rendering of all turns. Where this holds, an
inference engine that is at this place sees exactly what training saw. Where it doesn't, the turn is not trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from qlora.data.conversations.chat_messages import Conversation
from qlora.data.conversations.chat_template import Template, Turn
from qlora.data.conversations.safe_tokenizer import SafeTokenizer, TextPiece
from qlora.data.types import RecordError

_SENTINEL = "Sphinx of black quartz"


@dataclass(frozen=True, slots=True)
class MaskedText:
    """A rendered conversation in pieces; `skipped` counts answers that could not be shown to keep their prefix."""

    pieces: tuple[TextPiece, ...]
    skipped: int
    ends: bool  # the last trained piece closes with an end-of-turn token
    bare: bool  # the conversation ends with an answer that no control token closes


@dataclass(frozen=True, slots=True)
class Ending:
    """How the template closes an answer. `token` is empty where it writes no control token."""

    text: str
    token: str
    rest: int  # characters of its generation prompt that its rendering of an answer does not have


def ending_of(template: Template, tokeniser: SafeTokenizer) -> Ending:
    """How `template` closes an answer, seen on a probe conversation."""
    asked: list[Turn] = [{"role": "user", "content": "Judge my vow."}]
    prompt = template.render(asked, prompt=True)
    text = template.render([*asked, {"role": "assistant", "content": _SENTINEL}])
    if _SENTINEL not in text:
        raise RecordError("refused by the chat template", "it does not write what the assistant says")
    after = text[text.index(_SENTINEL) + len(_SENTINEL) :]
    token = tokeniser.control.search(after)
    closing = after[: token.end()] if token else (after.rstrip() or after)
    shared = min(text.index(_SENTINEL), len(prompt))
    parting = next((i for i in range(shared) if prompt[i] != text[i]), shared)
    return Ending(closing, token[0] if token else "", len(prompt) - parting)


class LossMasker:
    """Cuts conversations into pieces at the answers."""

    def __init__(self, template: Template, tokeniser: SafeTokenizer) -> None:
        self._template = template
        self._tokeniser = tokeniser
        self.ending = ending_of(template, tokeniser)

    def cut(self, chat: Conversation, prompt: bool = False) -> MaskedText:
        """The pieces of a conversation; with `prompt`, of the prompt for its next answer. RowError where refused."""
        full = self._template.render(chat.turns, chat.tools, prompt)
        pieces, at, ends, bare = list[TextPiece](), 0, False, False
        skipped = int(chat.wanted[0])  # the prompt of the very first word can't be rendered
        for i in (i for i, turn in enumerate(chat.turns) if i > 0 and turn["role"] == "assistant"):
            span = self._span(chat, i, full, prompt)
            if span is None or span[0] < at:
                skipped += chat.wanted[i]
                continue
            pieces += [TextPiece(full[at : span[0]]), TextPiece(full[span[0] : span[1]], chat.wanted[i])]
            at = span[1]
            closed = self._closes(pieces[-1].text)
            ends = closed if chat.wanted[i] else ends
            bare = i == len(chat.turns) - 1 and not closed
        if not bare:  # where the end token is still to come, it follows the answer at once
            pieces.append(TextPiece(full[at:]))
        return MaskedText(tuple(piece for piece in pieces if piece.text), skipped, ends, bare)

    def _span(self, chat: Conversation, i: int, full: str, prompt: bool) -> tuple[int, int] | None:
        """Where in `full` answer `i` stands, its end token included; None if the prefix law does not hold."""
        try:
            before = self._template.render(chat.turns[:i], chat.tools, prompt=True)
            whole = i + 1 == len(chat.turns) and not prompt
            after = full if whole else self._template.render(chat.turns[: i + 1], chat.tools)
        except RecordError:  # some templates refuse a conversation that stops here
            return None
        content = str(chat.turns[i].get("content") or "").strip()
        start = len(before) - (0 if after.startswith(before) else self.ending.rest)
        end = start + self._end(after[start:], content)
        if not after.startswith(before[:start]) or not full.startswith(after[:end]):
            return None
        _prove(chat.turns[i], content, before, after[start:end])
        return start, end

    def _end(self, said: str, content: str) -> int:
        """Where the answer's closing ends in `said`."""
        closing = self.ending.text
        at = said.rfind(closing) if closing else -1
        if at >= 0 and (self.ending.token or at >= len(content)):
            return at + len(closing)
        past = said.find(content) + len(content) if content and content in said else 0
        tokens = [token.end() for token in self._tokeniser.special.finditer(said, past)]
        return (tokens[0] if past else tokens[-1]) if tokens else len(said)

    def _closes(self, text: str) -> bool:
        found = self._tokeniser.control.findall(text)
        return bool(found) and text.endswith(found[-1])


def _prove(turn: Turn, content: str, before: str, said: str) -> None:
    """RowError unless the stretch to be trained holds all that the assistant says in the data, spacing aside.

    The first words may stand at the end of the prompt: templates that force a thought open it there.
    """
    if content and content not in said and not _continues(_squashed(before[-len(content) :]), _squashed(said), content):
        raise RecordError("the template drops part of an answer", f"{content[:60]!r}")
    for call in turn.get("tool_calls") or ():
        name = str(call.get("function", call).get("name", "")) if isinstance(call, Mapping) else ""
        if not name or name not in said:
            raise RecordError("the template does not write tool calls", name[:60])


def _continues(asked: str, said: str, content: str) -> bool:
    words = _squashed(content)
    at = (asked + said).rfind(words)
    return at >= 0 and at + len(words) > len(asked)


def _squashed(text: str) -> str:
    return "".join(text.split())
