"""Parts of a conversation that have no effect on training: keys that the template does not read, content it drops."""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from qlora.data.conversations.build_example import NOTHING
from qlora.data.conversations.chat_messages import Conversation
from qlora.data.conversations.chat_template import Template, Turn
from qlora.data.conversations.safe_tokenizer import without_whitespace
from qlora.data.conversations.thoughts import SAMPLE_CALL, THOUGHT_KEYS
from qlora.data.types import TOOLS, Message, RecordError, Unused

_KNOWN_KEYS = ("role", "content", "tool_calls", *THOUGHT_KEYS)  # the loss mask proves content and calls of answers
_MARKER = "Qx7Zq9Wk3"  # of nine letters and digits, as some templates require of a call's id
_SAMPLES = (  # a key is tried in each message of its role
    [("system", "Be brief."), ("user", "Judge my vow."), ("assistant", "Judged."), ("user", "Again.")],
    [("user", "Judge my vow."), ("assistant", "Judged."), ("user", "Again."), ("assistant", "Judged.")],
    [("user", "Judge my vow."), ("assistant", ""), ("tool", "Judged."), ("assistant", "Judged.")],
)


class UnusedParts:
    """Finds what a chat template does not write of a conversation."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self.reads = lru_cache(maxsize=4096)(self._reads)

    def find(self, messages: Sequence[Message], conversation: Conversation, text: str, train_on: str) -> Unused:
        """The unused parts of a record. text: the rendering of its conversation."""
        keys = {(turn["role"], key) for turn in conversation.turns for key in turn if key not in _KNOWN_KEYS}
        asked = {m.role for m in messages if m.train and m.role not in ("assistant", TOOLS)}
        contents = self._lost_contents(conversation, text)
        if not keys and not contents and not asked:
            return NOTHING  # the usual case
        return Unused(
            keys=tuple(sorted({key for role, key in keys if not self.reads(role, key)})),
            contents=contents,
            trained_roles=tuple(sorted(asked)) if train_on != "all" else (),
        )

    def _reads(self, role: str, key: str) -> bool:
        """Whether the template writes something else, or refuses, if the messages of a role have the key.

        A tool's answer may be joined to its call by any key that the template names, in ways that a sample can't show.
        """
        results = [self._changes(sample, role, key) for sample in _SAMPLES]
        known = [result for result in results if result is not None]
        if any(known) or (known and role != "tool"):
            return any(known)
        return bool(re.search(rf"\b{re.escape(key)}\b", self._template.text))

    def _changes(self, sample: Sequence[tuple[str, str]], role: str, key: str) -> bool | None:
        """Whether a sample's rendering depends on the key; None if the sample has no such role or can't be rendered."""
        if role not in (name for name, _ in sample):
            return None
        plain = self._rendered([_turn(name, content) for name, content in sample])
        for value in (_MARKER, True):
            turns = [{**_turn(name, text), **({key: value} if name == role else {})} for name, text in sample]
            with_key = self._rendered(turns)
            if with_key != plain:
                return True
        return None if plain is None else False

    def _rendered(self, turns: Sequence[Turn]) -> str | None:
        try:
            return self._template.render(turns, self._template.sample_tools)
        except RecordError:
            return None

    def _lost_contents(self, conversation: Conversation, text: str) -> tuple[str, ...]:
        """Roles, other than the assistant's, of messages whose content makes no difference to the rendering."""
        lost, dense = set(), ""
        for index, turn in enumerate(conversation.turns):
            content = str(turn["content"]).strip()
            if turn["role"] == "assistant" or not content or content in text:
                continue
            dense = dense or without_whitespace(text)
            forms = (content, json.dumps(content, ensure_ascii=False)[1:-1])  # some templates write content as JSON
            written = any(without_whitespace(form) in dense for form in forms)
            if not written and self._is_ignored(conversation, index, text):
                lost.add(str(turn["role"]))
        return tuple(sorted(lost))

    def _is_ignored(self, conversation: Conversation, index: int, text: str) -> bool:
        """Whether the rendering is `text` with another content of a turn, too."""
        turns: list[Any] = list(conversation.turns)
        turns[index] = {**turns[index], "content": _MARKER}
        try:
            return self._template.render(turns, conversation.tools) == text
        except RecordError:
            return False


def _turn(role: str, content: str) -> dict[str, Any]:
    """A turn of a sample, with the keys that tool conversations need."""
    if role == "tool":
        return {"role": role, "content": content, "name": "judge", "tool_call_id": SAMPLE_CALL["id"]}
    return {"role": role, "content": content, **({} if content else {"tool_calls": [SAMPLE_CALL]})}
