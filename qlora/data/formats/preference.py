"""The preference format: chosen, rejected (+ prompt, system, tools), as texts, messages or whole conversations."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qlora.data.formats.messages import parse_messages
from qlora.data.reading import record_fields
from qlora.data.reading.tool_calls import tools
from qlora.data.types import CHOSEN, REJECTED, ROLES, Message, Record, RecordError

_PROMPTS = ("prompt", "question", "instruction", "conversations")  # columns with the prompt, the first that is there
_SCORES = (  # columns with the scores of both answers, as data sets name them
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")  # Anthropic's HH: a conversation as one text
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


class Preference:
    """Records with a chosen and a rejected answer to one prompt.

    The answers follow the prompt column; or both are whole conversations, and what they begin with is the prompt.
    """

    def matches(self, fields: Mapping[str, Any]) -> bool:
        """Whether the columns are those of this format."""
        return all(role in fields for role in ROLES)

    def messages(self, record: Record) -> list[Message]:
        """The conversation of the chosen answer. RecordError if the record can't be read."""
        return self.sides(record)[0][1]

    def sides(self, record: Record) -> list[tuple[int, list[Message]]]:
        """Both conversations, chosen first. RecordError if one can't be read, and for a pair without a preference."""
        fields = record.fields
        _refuse_ties(fields)
        answers = [_answer(fields, role) for role in ROLES]
        prompt = _prompt(fields)
        if all(_is_conversation(answer) for answer in answers):
            prompt, answers = _split(prompt, answers)
        elif any(_is_conversation(answer) for answer in answers):
            raise RecordError("different prompts", "one side is a whole conversation, the other one an answer")
        if not prompt:
            raise RecordError("missing field", "prompt, and the sides are no whole conversations")
        if answers[0] == answers[1]:
            raise RecordError("identical sides", "chosen and rejected are the same")
        return [
            (role, _conversation(fields, prompt, answer))
            for role, answer in zip((CHOSEN, REJECTED), answers, strict=True)
        ]


def _conversation(fields: Mapping[str, Any], prompt: Sequence[Message], answer: Sequence[Message]) -> list[Message]:
    """One side; what precedes the answer bears no loss."""
    messages = [*(replace(message, prompt=True) for message in prompt), *answer]
    return record_fields.require_answers([*tools(fields), *record_fields.system(fields, messages)])


def _answer(fields: Mapping[str, Any], name: str) -> list[Message]:
    """The messages of a side: an answer, or a conversation."""
    value = fields.get(name)
    if isinstance(value, list):
        return _messages(value, name)
    if isinstance(value, Mapping):
        return _messages([value], name)
    text = record_fields.text(fields, name)
    return _transcript(text) or [Message("assistant", text)]


def _messages(items: list[Any], name: str) -> list[Message]:
    """Messages with OpenAI's keys, or with ShareGPT's."""
    return parse_messages([_openai_keys(item) for item in items], name)


def _openai_keys(item: Any) -> Any:
    if not isinstance(item, Mapping) or "from" not in item or "role" in item:
        return item
    return {"role": item["from"], "content": item.get("value")}


def _transcript(text: str) -> list[Message]:
    """The turns of a text that begins with `Human: `; empty for any other text."""
    parts = _TURN.split(text)
    if len(parts) < 3 or parts[0] or parts[1] != "Human":
        return []
    return [Message(_SPEAKERS[speaker], words.strip()) for speaker, words in zip(parts[1::2], parts[2::2], strict=True)]


def _prompt(fields: Mapping[str, Any]) -> list[Message]:
    """The messages of the prompt column; none if there is no such column."""
    name = next((name for name in _PROMPTS if fields.get(name) is not None), None)
    if name is None:
        return []
    value = fields[name]
    if isinstance(value, list):
        return _messages(value, name)
    text = record_fields.text(fields, name)
    context = record_fields.optional_text(fields, "input") if name == "instruction" else ""
    return _transcript(text) or [Message("user", f"{text}\n\n{context}" if context else text)]


def _is_conversation(answer: Sequence[Message]) -> bool:
    return answer[0].role != "assistant"


def _split(prompt: Sequence[Message], answers: Sequence[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """Prompt and answers of two conversations: up to where they differ. RecordError if that is no answer of both."""
    first, second = answers
    if first == second:
        raise RecordError("identical sides", "chosen and rejected are the same conversation")
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    ends = [answer[shared].role if shared < len(answer) else "the end" for answer in answers]
    if not shared or ends != ["assistant", "assistant"]:
        raise RecordError("different prompts", f"after {shared} equal messages follow {ends[0]} and {ends[1]}")
    common = first[:shared]
    if prompt and prompt[-1].content.strip() not in {message.content.strip() for message in common}:
        raise RecordError("different prompts", "the prompt column is not in the conversations")
    return common, [first[shared:], second[shared:]]


def _refuse_ties(fields: Mapping[str, Any]) -> None:
    """RecordError if the record's scores prefer no side, or the rejected one."""
    for names in _SCORES:
        scores = [fields.get(name) for name in names]
        if not all(isinstance(score, int | float) and not isinstance(score, bool) for score in scores):
            continue
        chosen, rejected = (float(score) for score in scores if score is not None)
        if chosen == rejected:
            raise RecordError("tie", f"{names[0]} and {names[1]} are both {chosen:g}")
        if chosen < rejected:
            raise RecordError("sides exchanged", f"{names[0]} is {chosen:g}, {names[1]} is {rejected:g}")
