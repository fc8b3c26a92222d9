"""Thoughts of an answer: read from a record in any of their forms, and handed to the template in the form it reads.

A record has them under a key, or as <think>...</think> at the start of `content`. A template reads a key, or takes the
block in the content apart, or has no place for them: a sample conversation shows which.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from qlora.data.conversations.chat_template import Template
from qlora.data.types import Message, RecordError

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
CONTENT = "content"  # the place of a template that reads thoughts in the content
IN_CONTENT = "<think> in content"  # how messages to the user name this form
TAGS = ("think", "thinking", "thought")
_OPENING = re.compile(rf"\s*<({'|'.join(TAGS)})>")
_CLOSING_ONLY = re.compile(r"</think>[ \t]*(?:\r?\n|\Z)")  # at the end of a line: in the middle it is quoted
SAMPLE_CALL: Mapping[str, Any] = {  # its id is of nine letters and digits, as some templates require
    "id": "3kW9qZ7xQ",
    "type": "function",
    "function": {"name": "judge", "arguments": {}},
}
_MARKER, _SAMPLE_ANSWER = "Zephyrs vexed my jaw", "Sphinx of black quartz"


class Thought(NamedTuple):
    """The thought of a message, where the record has it, and its content without it."""

    text: str
    form: str  # the key, or IN_CONTENT
    content: str


@dataclass(frozen=True, slots=True)
class ThoughtPlace:
    """Where a template writes thoughts. key: empty if it has no place; CONTENT for a block in the content.

    opening, closing: what it writes around a thought. keeps_content: a block in the content stays in its answer.
    """

    key: str = ""
    opening: str = ""
    closing: str = ""
    keeps_content: bool = True


def find_place(template: Template, with_calls: bool = False) -> ThoughtPlace:
    """Where `template` writes the thoughts of answers, or of those with tool calls. RecordError if it doubles them."""
    question = {"role": "user", "content": "Judge my vow."}
    answer: dict[str, Any] = {"role": "assistant", "content": "" if with_calls else _SAMPLE_ANSWER}
    answer |= {"tool_calls": [SAMPLE_CALL]} if with_calls else {}
    prompt = _rendered(template, [question], prompt=True)
    for key in THOUGHT_KEYS:
        text = _rendered(template, [question, {**answer, key: _MARKER}])
        end = SAMPLE_CALL["function"]["name"] if with_calls else _SAMPLE_ANSWER
        own = text.removeprefix(prompt)
        if text.startswith(prompt) and -1 < own.find(_MARKER) < own.find(end):
            return _place(key, own, end)
    block = f"<think>\n{_MARKER}\n</think>\n\n{answer['content']}"
    text = _rendered(template, [question, {**answer, "content": block}])
    if text and not (_MARKER in text and text.startswith(prompt)):
        return ThoughtPlace(keeps_content=False)
    return ThoughtPlace(CONTENT if "think>" in template.text else "", "<think>", "</think>")


def _place(key: str, text: str, answer: str) -> ThoughtPlace:
    """The place of a template that reads `key`. text: what it writes after the prompt; answer: what comes next."""
    before, _, after = text.partition(_MARKER)
    closing = after.partition(answer)[0]
    if _MARKER in closing or any((before + closing).count(f"<{tag}>") > 1 for tag in TAGS):
        raise RecordError("refused by the chat template", "it writes the think block of an answer twice")
    return ThoughtPlace(key, before.strip(), closing.strip(), keeps_content=False)


def _rendered(template: Template, turns: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
    try:
        return template.render(turns, template.sample_tools, prompt)
    except RecordError:
        return ""


def read_thought(message: Message, number: int) -> Thought | None:
    """The thought of an assistant's message; None if it has none. RecordError for two that differ, or an unclosed one.

    number: of the message, for errors. An empty thought is none, but it is taken out of the content.
    """
    if not message.extra and not _may_have_block(message.content):
        return None  # the usual case
    texts = {key: message.extra[key] for key in THOUGHT_KEYS if message.extra.get(key)}
    for key, text in texts.items():
        if not isinstance(text, str):
            detail = f"message {number}: {key} is {type(text).__name__}, a string is expected"
            raise RecordError("wrong type", detail)
    texts = {key: text.strip() for key, text in texts.items() if text.strip()}
    block = _block_of(message, number)
    content = block[1] if block else message.content
    if block and (block[0] or not texts):
        texts[IN_CONTENT] = block[0]
    if len({"".join(text.split()) for text in texts.values()}) > 1:
        raise RecordError("two thoughts", f"message {number}: {' and '.join(texts)} differ")
    form = next(iter(texts), None)
    return None if form is None else Thought(texts[form], form, content)


def _block_of(message: Message, number: int) -> tuple[str, str] | None:
    """The thought at the start of a message's content, and what follows it; None if there is none."""
    content = message.content
    if not _may_have_block(content):
        return None
    opening = _OPENING.match(content)
    if opening:
        tag = f"</{opening[1]}>"
        ends = [match.start() for match in re.finditer(re.escape(tag), content)]
        if not ends:
            if message.train is False:
                return None
            raise RecordError("unclosed thought", f"message {number}: <{opening[1]}> without {tag}")
        end = next((at for at in ends if not _is_quoted(content, opening.end(), at)), ends[0])
        return content[opening.end() : end].strip(), content[end + len(tag) :].lstrip()
    closings = _CLOSING_ONLY.finditer(content)
    closing = next((match for match in closings if not _is_quoted(content, 0, match.start())), None)
    if closing is None or "<think>" in content[: closing.start()]:
        return None
    return content[: closing.start()].strip(), content[closing.end() :].lstrip()


def _may_have_block(content: str) -> bool:
    return "think" in content or "thought" in content


def _is_quoted(text: str, start: int, at: int) -> bool:
    """Whether a tag at `at` is inside of code: after an odd number of backticks."""
    return text.count("`", start, at) % 2 == 1


class ThoughtWriter:
    """Hands thoughts to a template in the form that it reads. mode: data.thinking. RecordError if it doubles them."""

    def __init__(self, template: Template, mode: str) -> None:
        self.place = find_place(template)
        self._call_place, self._mode = find_place(template, with_calls=True), mode

    def write(self, messages: Sequence[Message]) -> tuple[Sequence[Message], dict[int, str]]:
        """`messages` with thoughts in the template's form, and the form of each thought by its message's index.

        The form is empty for a thought that the template gets, else it is where the record has the thought.
        """
        written, forms = list(messages), dict[int, str]()
        for index, message in enumerate(messages):
            thought = read_thought(message, index + 1) if message.role == "assistant" else None
            if thought is not None:
                written[index], kept = self._written(message, thought)
                forms |= {index: "" if kept else thought.form} if thought.text else {}
        return written, forms

    def _written(self, message: Message, thought: Thought) -> tuple[Message, bool]:
        """The message in the template's form, and whether it has the thought."""
        place = self._call_place if message.extra.get("tool_calls") else self.place
        extra = {key: value for key, value in message.extra.items() if key not in THOUGHT_KEYS}
        without = replace(message, content=thought.content, extra=extra)
        if self._mode == "drop" or (not thought.text and not place.keeps_content):
            return without, False
        if place.key in THOUGHT_KEYS:
            return replace(without, extra={**extra, place.key: thought.text}), True
        if thought.form == IN_CONTENT and place.keeps_content:
            return replace(message, extra=extra), True
        if place.keeps_content and (place.key == CONTENT or self._mode == "in_content"):
            return replace(without, content=f"<think>\n{thought.text}\n</think>\n\n{thought.content}"), True
        return without, False
