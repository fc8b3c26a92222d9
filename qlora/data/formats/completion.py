"""prompt, completion (or question, answer): one user turn and one assistant turn, or message lists on both sides."""

from collections.abc import Mapping
from typing import Any

from qlora.data import checks
from qlora.data.formats.messages import conversation
from qlora.data.types import Message, Row

_PAIRS = (("prompt", "completion"), ("question", "answer"))


class Completion:
    """Rows of a prompt and what should follow it."""

    def matches(self, fields: Mapping[str, Any]) -> bool:
        """Whether the columns are those of this format."""
        return any(prompt in fields and completion in fields for prompt, completion in _PAIRS)

    def messages(self, row: Row) -> list[Message]:
        """The turns of `row`; only the completion's are trained. RowError if one can't be read."""
        pair = next((pair for pair in _PAIRS if pair[0] in row.fields or pair[1] in row.fields), _PAIRS[0])
        asked = _side(row.fields, pair[0], "user")
        turns = [Message(turn.role, turn.content, False, turn.extra) for turn in asked]
        return checks.answered([*checks.tools(row.fields), *turns, *_side(row.fields, pair[1], "assistant")])


def _side(fields: Mapping[str, Any], name: str, role: str) -> list[Message]:
    if isinstance(fields.get(name), list):
        return conversation(fields[name], name)
    return [Message(role, checks.text(fields, name))]
