"""The loss mask: which spans of a rendered conversation the assistant must produce, located by rendering prefixes.

Let P be the prompt that the template renders for the turns before an answer, A the rendering that ends with the answer,
and F the rendering of all turns. P must be the beginning of A, and A, up to the end-of-turn token, the beginning of F.
Then inference, when it generates this answer, sees exactly what training saw. Otherwise the answer is not trained.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora.data.conversations.chat_messages import Conversation
from qlora.data.conversations.chat_template import Template, Turn
from qlora.data.conversations.safe_tokenizer import SafeTokenizer, TextPiece, without_whitespace
from qlora.data.types import RecordError

# A think block without a thought, as templates write it before an answer (Qwen3: "<think>\n\n</think>\n\n"). Some open
# it in the prompt, or write its end alone (DeepSeek V3.1).
_EMPTY_THINKING = re.compile(r"\s*(?:<(?:think|thinking|thought)>\s*)?</(?:think|thinking|thought)>\s*")
_SAMPLE_ANSWER = "Sphinx of black quartz"


@dataclass(frozen=True, slots=True)
class MaskedText:
    """A rendered conversation, `text`, in pieces, each trained or not."""

    text: str
    pieces: tuple[TextPiece, ...]
    unlocated: tuple[int, ...]  # answers whose prompt is not a prefix of the rendering: they can't be trained
    end_trained: bool  # the last trained piece ends with an end-of-turn token
    needs_eos: bool  # the conversation ends with an answer that no control token closes


@dataclass(frozen=True, slots=True)
class AnswerEnding:
    """How a template closes an answer. `token` is empty if it writes no control token."""

    text: str
    token: str
    prompt_only_chars: int  # at the end of its generation prompt, not in its rendering of an answer
    trained_header: str  # what it writes before an answer although it has no generation prompt


def may_write_thoughts(template_text: str) -> bool:
    """Whether a template has a think block in it."""
    return "think" in template_text or "thought" in template_text


def find_ending(template: Template, tokenizer: SafeTokenizer) -> AnswerEnding:
    """How `template` closes an answer, measured on a sample conversation."""
    question, tools = [{"role": "user", "content": "Judge my vow."}], template.sample_tools
    prompt = template.render(question, tools, prompt=True)
    text = template.render([*question, {"role": "assistant", "content": _SAMPLE_ANSWER}], tools)
    if _SAMPLE_ANSWER not in text:
        raise RecordError("refused by the chat template", "it does not write the assistant's messages")
    after = text[text.index(_SAMPLE_ANSWER) + len(_SAMPLE_ANSWER) :]
    token = tokenizer.control_pattern.search(after)
    closing = after[: token.end()] if token else (after.rstrip() or after)
    longest = min(text.index(_SAMPLE_ANSWER), len(prompt))
    common = next((i for i in range(longest) if prompt[i] != text[i]), longest)
    header = "" if _has_generation_prompt(template, question, prompt) else text[common : text.index(_SAMPLE_ANSWER)]
    return AnswerEnding(closing, token[0] if token else "", len(prompt) - common, header.strip())


def _has_generation_prompt(template: Template, question: Sequence[Turn], prompt: str) -> bool:
    """Whether `template` writes something else where an answer is asked for. prompt: the question's rendering so."""
    try:
        return template.render(question, template.sample_tools) != prompt
    except RecordError:  # it refuses a conversation that ends with a question
        return True


class LossMasker:
    """Splits rendered conversations into pieces at the answers."""

    def __init__(self, template: Template, tokenizer: SafeTokenizer, masks_empty_thinking: bool) -> None:
        self._template, self._tokenizer = template, tokenizer
        self._masks_empty_thinking = masks_empty_thinking and may_write_thoughts(template.text)
        self.ending = find_ending(template, tokenizer)

    def mask(self, conversation: Conversation, prompt: bool = False) -> MaskedText:
        """The pieces of a conversation; with `prompt`, of the prompt for its next answer. RecordError if refused."""
        turns, trained = conversation.turns, conversation.trained
        full = self._template.render(turns, conversation.tools, prompt)
        pieces, at, end_trained, needs_eos = list[TextPiece](), 0, False, False
        unlocated = [0] if turns[0]["role"] == "assistant" else []  # a first message has no prompt to be rendered
        for i in (i for i, turn in enumerate(turns) if i > 0 and turn["role"] == "assistant"):
            span = self._answer_span(conversation, i, full, prompt)
            if span is None or span[0] < at:
                unlocated.append(i)
                continue
            start = span[0] + self._empty_thinking_chars(full[span[0] : span[1]], turns[i])
            answer = TextPiece(full[start : span[1]], trained[i], conversation.masked[i])
            pieces += [TextPiece(full[at:start]), answer]
            at = span[1]
            closed = self._ends_with_control_string(pieces[-1].text)
            end_trained = closed if trained[i] else end_trained
            needs_eos = i == len(turns) - 1 and not closed
        if not needs_eos:  # an end token that is added later follows the answer directly
            pieces.append(TextPiece(full[at:]))
        return MaskedText(
            full, tuple(piece for piece in pieces if piece.text), tuple(unlocated), end_trained, needs_eos
        )

    def _empty_thinking_chars(self, answer: str, turn: Turn) -> int:
        """Length of an empty think block at the beginning of `answer` that the template wrote, not the record."""
        block = _EMPTY_THINKING.match(answer) if self._masks_empty_thinking else None
        return block.end() if block and not _EMPTY_THINKING.match(str(turn.get("content") or "")) else 0

    def _answer_span(self, conversation: Conversation, i: int, full: str, prompt: bool) -> tuple[int, int] | None:
        """Start and end of answer `i` in `full`, its end token included; None if a prefix differs."""
        turns, tools = conversation.turns, conversation.tools
        try:
            before = self._template.render(turns[:i], tools, prompt=True)
            is_full = i + 1 == len(turns) and not prompt
            after = full if is_full else self._template.render(turns[: i + 1], tools)
        except RecordError:  # some templates refuse a conversation that stops here
            return None
        content = str(turns[i].get("content") or "").strip()
        start = len(before) - (0 if after.startswith(before) else self.ending.prompt_only_chars)
        end = start + self._answer_end(after[start:], content)
        if not after.startswith(before[:start]) or not full.startswith(after[:end]):
            return None
        _require_complete(turns[i], content, before, after[start:end])
        return start, end

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


def _continues(before: str, answer: str, content: str) -> bool:
    """Whether `content`, whitespace aside, starts in `before` and ends in `answer`, or is all in `answer`."""
    before, answer, content = (without_whitespace(text) for text in (before, answer, content))
    at = (before + answer).rfind(content)
    return at >= 0 and at + len(content) > len(before)
