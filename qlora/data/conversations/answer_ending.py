"""How a chat template closes an answer, and what it writes before one: measured on a sample conversation."""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora.data.conversations.chat_template import Template, Turn
from qlora.data.conversations.safe_tokenizer import SafeTokenizer
from qlora.data.types import RecordError

_SAMPLE_ANSWER = "Sphinx of black quartz"


@dataclass(frozen=True, slots=True)
class AnswerEnding:
    """How a template closes an answer. `token` is empty if it writes no control token."""

    text: str
    token: str
    prompt_only_chars: int  # at the end of its generation prompt, not in its rendering of an answer
    trained_header: str  # what it writes before an answer although it has no generation prompt


def find_ending(template: Template, tokenizer: SafeTokenizer) -> AnswerEnding:
    """How `template` closes an answer, measured on a sample conversation."""
    question, tools = [{"role": "user", "content": "Judge my vow."}], template.sample_tools
    prompt = template.render(question, tools, prompt=True)
    text = template.render([*question, {"role": "assistant", "content": _SAMPLE_ANSWER}], tools)
    if _SAMPLE_ANSWER not in text:
        raise RecordError("refused by the chat template", "it does not write the assistant's messages")
    if text.count(_SAMPLE_ANSWER) > 1:
        raise RecordError("refused by the chat template", "it writes an answer twice")
    after = text[text.index(_SAMPLE_ANSWER) + len(_SAMPLE_ANSWER) :]
    token = tokenizer.control_pattern.search(after)
    closing = after[: token.end()] if token else (after.rstrip() or after)
    if token:
        closing = _with_adjacent_tokens(closing, after, template, tokenizer)
    longest = min(text.index(_SAMPLE_ANSWER), len(prompt))
    common = next((i for i in range(longest) if prompt[i] != text[i]), longest)
    header = "" if _has_generation_prompt(template, question, prompt) else text[common : text.index(_SAMPLE_ANSWER)]
    return AnswerEnding(closing, token[0] if token else "", len(prompt) - common, header.strip())


def _with_adjacent_tokens(closing: str, after: str, template: Template, tokenizer: SafeTokenizer) -> str:
    """`closing` with the control tokens that follow it directly, also where a question comes next (Cohere's R7B)."""
    turns = [{"role": role, "content": _SAMPLE_ANSWER} for role in ("user", "assistant", "user")]
    try:
        later = template.render(turns, template.sample_tools)
    except RecordError:  # it refuses a conversation that ends with a question
        return closing
    while token := tokenizer.control_pattern.match(after, len(closing)):
        if f"{_SAMPLE_ANSWER}{after[: token.end()]}" not in later:
            break
        closing = after[: token.end()]
    return closing


def _has_generation_prompt(template: Template, question: Sequence[Turn], prompt: str) -> bool:
    """Whether `template` writes something else where an answer is asked for. prompt: the question's rendering so."""
    try:
        return template.render(question, template.sample_tools) != prompt
    except RecordError:  # it refuses a conversation that ends with a question
        return True
