"""The completion format: prompt, completion (or question, answer, and MMLU's choices), as texts or message lists."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qlora.data.formats.messages import parse_messages
from qlora.data.reading import record_fields
from qlora.data.reading.tool_calls import tools
from qlora.data.types import Message, Record, RecordError

LETTERS = "ABCDEFGHIJ"  # of the choices of a multiple-choice question
_QUESTION = ("question", "answer")
_PAIRS = (("prompt", "completion"), _QUESTION)


class Completion:
    """Records with a prompt and its completion."""

    def matches(self, fields: Mapping[str, Any]) -> bool:
        """Whether the columns are those of this format."""
        return any(prompt in fields and completion in fields for prompt, completion in _PAIRS)

    def messages(self, record: Record) -> list[Message]:
        """The messages of `record`; those of the prompt bear no loss by default. RecordError if one can't be read."""
        pair = next((pair for pair in _PAIRS if pair[0] in record.fields or pair[1] in record.fields), _PAIRS[0])
        fields = _with_choices(record.fields) if pair == _QUESTION else record.fields
        prompt = [replace(message, prompt=True) for message in _messages(fields, pair[0], "user")]
        completion = _messages(fields, pair[1], "assistant")
        messages = record_fields.system(record.fields, [*prompt, *completion])
        return record_fields.require_answers([*tools(record.fields), *messages])


def _with_choices(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """A question with `choices` (MMLU's columns) as one that lists them as A. B. ... and has a letter as its answer."""
    if not isinstance(fields.get("choices"), list):
        return fields
    choices, answer = fields["choices"], fields.get("answer")
    if not 2 <= len(choices) <= len(LETTERS) or not all(isinstance(choice, str) for choice in choices):
        raise RecordError("wrong choices", f"choices must be 2 to {len(LETTERS)} texts")
    letters = LETTERS[: len(choices)]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        answer = letters[answer]
    if not isinstance(answer, str) or len(answer) != 1 or answer not in letters:
        raise RecordError("wrong answer", f"answer must be one of {letters[0]} to {letters[-1]}, or a number from 0")
    listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    question = f"{record_fields.text(fields, 'question')}{listed}\nAnswer:"
    return {"question": question, "answer": answer}


def _messages(fields: Mapping[str, Any], name: str, role: str) -> list[Message]:
    if isinstance(fields.get(name), list):
        return parse_messages(fields[name], name)
    return [Message(role, record_fields.text(fields, name))]
