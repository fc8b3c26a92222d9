"""The feedback format: prompt, completion (or messages), and label: true for a wanted answer, false for an unwanted."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qlora.data.formats.completion import Completion
from qlora.data.formats.messages import Messages
from qlora.data.types import CHOSEN, REJECTED, Message, Record, RecordError


class Feedback:
    """Records of one answer and what somebody thought of it."""

    def matches(self, fields: Mapping[str, Any]) -> bool:
        """Whether the columns are those of this format."""
        return isinstance(fields.get("label"), bool) and (Completion().matches(fields) or Messages().matches(fields))

    def messages(self, record: Record) -> list[Message]:
        """The messages of `record`. RecordError if one can't be read, or the label is neither true nor false."""
        return self.sides(record)[0][1]

    def sides(self, record: Record) -> list[tuple[int, list[Message]]]:
        """The conversation, wanted or not. Only its last answer bears loss. RecordError as `messages`."""
        label = record.fields.get("label")
        if not isinstance(label, bool):
            missing = "label" not in record.fields
            raise RecordError("missing field" if missing else "wrong label", "label" if missing else repr(label)[:40])
        messages = (Messages if Messages().matches(record.fields) else Completion)().messages(record)
        if messages[-1].role != "assistant":
            raise RecordError("no assistant turn", f"the last message is the {messages[-1].role}'s")
        context = [replace(message, prompt=True) for message in messages[:-1]]
        return [(CHOSEN if label else REJECTED, [*context, messages[-1]])]
