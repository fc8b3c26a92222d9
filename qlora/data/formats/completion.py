"""prompt, completion (or question, answer, and MMLU's choices): a user turn and an assistant turn, or message lists."""

from collections.abc import Mapping
from typing import Any

from qlora.data.formats.messages import conversation
from qlora.data.reading import record_fields
from qlora.data.types import Message, Record, RecordError

_LETTERS = "ABCDEFGHIJ"
_PAIRS = (("prompt", "completion"), ("question", "answer"))


class Completion:
    """Rows of a prompt and what should follow it."""

    def matches(self, fields: Mapping[str, Any]) -> bool:
        """Whether the columns are those of this format."""
        return any(prompt in fields and completion in fields for prompt, completion in _PAIRS)

    def messages(self, row: Record) -> list[Message]:
        """The turns of `row`; only the completion's are trained. RowError if one can't be read."""
        pair = next((pair for pair in _PAIRS if pair[0] in row.fields or pair[1] in row.fields), _PAIRS[0])
        fields = _lettered(row.fields)
        asked = _side(fields, pair[0], "user")
        turns = [Message(turn.role, turn.content, False, turn.extra) for turn in asked]
        return record_fields.answered([*record_fields.tools(fields), *turns, *_side(fields, pair[1], "assistant")])


def _lettered(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """A question with `choices` (MMLU's columns) as one that lists them A. B. ... and is answered by a letter."""
    choices, answer = fields.get("choices"), fields.get("answer")
    if not isinstance(choices, list) or "question" not in fields:
        return fields
    if not 2 <= len(choices) <= len(_LETTERS) or not all(isinstance(choice, str) for choice in choices):
        raise RecordError("wrong choices", f"choices must be 2 to {len(_LETTERS)} texts")
    letters = _LETTERS[: len(choices)]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        answer = letters[answer]
    if not isinstance(answer, str) or len(answer) != 1 or answer not in letters:
        raise RecordError("wrong answer", f"answer must be one of {letters[0]} to {letters[-1]}, or a number from 0")
    listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    return {**fields, "question": f"{record_fields.text(fields, 'question')}{listed}\nAnswer:", "answer": answer}


def _side(fields: Mapping[str, Any], name: str, role: str) -> list[Message]:
    if isinstance(fields.get(name), list):
        return conversation(fields[name], name)
    return [Message(role, record_fields.text(fields, name))]
