"""The loss mask: which spans of a rendered conversation the assistant must produce, located by rendering prefixes.

Let P be the prompt that the template renders for the turns before an answer, and A the rendering that ends with the
answer. P must be the beginning of A: then inference, when it generates this answer, sees exactly what training saw.
Where A, up to the end-of-turn token, is the beginning of the rendering of all turns, the answer is trained there. Where
later turns rewrite it, it is trained in A (text_paths.py).
"""

import re
from collections.abc import Mapping

from qlora.data.conversations.answer_ending import find_ending
from qlora.data.conversations.chat_messages import Conversation
from qlora.data.conversations.chat_template import Template, Turn
from qlora.data.conversations.safe_tokenizer import SafeTokenizer, without_whitespace
from qlora.data.conversations.text_paths import MaskedText, PathBuilder, Stretch, TextPath
from qlora.data.conversations.thoughts import THOUGHT_KEYS
from qlora.data.types import RecordError

# A think block without a thought, as templates write it before an answer (Qwen3: "<think>\n\n</think>\n\n"). Some open
# it in the prompt, or write its end alone (DeepSeek V3.1).
_EMPTY_THINKING = re.compile(r"\s*(?:<(?:think|thinking|thought)>\s*)?</(?:think|thinking|thought)>\s*")


def may_write_thoughts(template_text: str) -> bool:
    """Whether a template has a think block in it."""
    return "think" in template_text or "thought" in template_text


class LossMasker:
    """Locates the answers in rendered conversations."""

    def __init__(self, template: Template, tokenizer: SafeTokenizer, masks_empty_thinking: bool) -> None:
        self._template, self._tokenizer = template, tokenizer
        self._masks_empty_thinking = masks_empty_thinking and may_write_thoughts(template.text)
        self.ending = find_ending(template, tokenizer)

    def mask(self, conversation: Conversation, train_all: bool) -> MaskedText:
        """The renderings of a conversation and its answers in them. RecordError if refused.

        train_all: every token of the rendering of all turns bears loss, but for masked answers.
        """
        turns, trained = conversation.turns, conversation.trained
        full = self._template.render(turns, conversation.tools)
        builder, unlocated, unthought, end_trained = PathBuilder(full), list[int](), list[int](), None
        for i in (i for i in range(len(turns) - 1, 0, -1) if turns[i]["role"] == "assistant"):
            text, stretch = self._answer(conversation, i, full) or ("", None)
            closed = self._ends_with_control_string(text)
            if stretch is None or not builder.place(text, stretch, closed):
                unlocated.append(i)
                continue
            if not closed and i == len(turns) - 1:
                builder.cut(stretch.end)
            if not _has_thought(turns[i], text[stretch.start :]):
                unthought.append(i)
            end_trained = closed if trained[i] and end_trained is None else end_trained
        if turns[0]["role"] == "assistant":
            unlocated.append(0)  # a first message has no prompt to be rendered
        unlocated.reverse()
        return MaskedText(full, builder.paths(train_all), tuple(unlocated), bool(end_trained), frozenset(unthought))

    def prompt(self, conversation: Conversation) -> MaskedText:
        """The prompt for the next answer of a conversation. RecordError if refused."""
        text = self._template.render(conversation.turns, conversation.tools, prompt=True)
        return MaskedText(text, (TextPath(text),))

    def _empty_thinking_chars(self, answer: str, turn: Turn) -> int:
        """Length of an empty think block at the beginning of `answer` that the template wrote, not the record."""
        block = _EMPTY_THINKING.match(answer) if self._masks_empty_thinking else None
        return block.end() if block and not _EMPTY_THINKING.match(str(turn.get("content") or "")) else 0

    def _answer(self, conversation: Conversation, i: int, full: str) -> tuple[str, Stretch] | None:
        """The rendering up to the end of answer `i`, its end token included, and the answer in it.

        None if its prompt is not the beginning. full: the rendering of all turns.
        """
        turns, tools = conversation.turns, conversation.tools
        try:
            before = self._template.render(turns[:i], tools, prompt=True)
            after = full if i + 1 == len(turns) else self._template.render(turns[: i + 1], tools)
            after = after if after.startswith(before) else self._with_own_prompt(conversation, i, before, after)
        except RecordError:  # some templates refuse a conversation that stops here
            return None
        content = str(turns[i].get("content") or "").strip()
        start = len(before) - (0 if after.startswith(before) else self.ending.prompt_only_chars)
        end = start + self._answer_end(after[start:], content)
        if not after.startswith(before[:start]):
            return None
        answer = after[start:end]
        _require_complete(turns[i], content, before, answer)
        first = start + self._empty_thinking_chars(answer, turns[i])
        stretch = Stretch(start, first, end, conversation.trained[i], conversation.masked[i])
        return (after[:end], stretch) if answer else None

    def _with_own_prompt(self, conversation: Conversation, i: int, before: str, after: str) -> str:
        """The rendering with answer `i` behind its prompt, where it is behind one without thoughts of the past.

        gpt-oss takes the thoughts before a call out as soon as there is an answer; inference sees them in its prompt.
        """
        if not any(key in turn for turn in conversation.turns[:i] for key in THOUGHT_KEYS):
            return after
        past = [{key: turn[key] for key in turn if key not in THOUGHT_KEYS} for turn in conversation.turns[:i]]
        prompt = self._template.render(past, conversation.tools, prompt=True)
        return before + after.removeprefix(prompt) if after.startswith(prompt) else after

    def _answer_end(self, text: str, content: str) -> int:
        """Where the answer at the beginning of `text` ends, its closing included."""
        closing = self.ending.text
        at = text.rfind(closing) if closing else -1
        if at >= 0 and (self.ending.token or at >= len(content)):
            return at + len(closing)
        content_end = text.find(content) + len(content) if content and content in text else 0
        token_ends = [token.end() for token in self._tokenizer.special_pattern.finditer(text, content_end)]
        return (token_ends[0] if content_end else token_ends[-1]) if token_ends else len(text)

    def _ends_with_control_string(self, text: str) -> bool:
        control_strings = self._tokenizer.control_pattern.findall(text)
        return bool(control_strings) and text.endswith(control_strings[-1])


def _require_complete(turn: Turn, content: str, before: str, answer: str) -> None:
    """RecordError unless `answer`, the span to be trained, has all of the turn's content, whitespace aside.

    The content may start at the end of the prompt: a template that forces a thought opens it there.
    """
    if content and content not in answer and not _continues(before[-len(content) :], answer, content):
        remedy = "Name a template that keeps it in model.chat_template, or take that part out of the record"
        raise RecordError("the template drops part of an answer", f"{content[:60]!r}. {remedy}")
    for call in turn.get("tool_calls") or ():
        name = str(call.get("function", call).get("name", "")) if isinstance(call, Mapping) else ""
        if not name or name not in answer:
            raise RecordError("the template does not write tool calls", name[:60])


def _has_thought(turn: Turn, answer: str) -> bool:
    """Whether `answer` has the thought that the template gets under a key, whitespace aside."""
    thoughts = [turn[key] for key in THOUGHT_KEYS if isinstance(turn.get(key), str)]
    return all(thought in answer or without_whitespace(thought) in without_whitespace(answer) for thought in thoughts)


def _continues(before: str, answer: str, content: str) -> bool:
    """Whether `content`, whitespace aside, starts in `before` and ends in `answer`, or is all in `answer`."""
    before, answer, content = (without_whitespace(text) for text in (before, answer, content))
    at = (before + answer).rfind(content)
    return at >= 0 and at + len(content) > len(before)
