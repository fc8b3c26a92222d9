"""The text format: text: plain text, all of it trained, with the end token after it."""

from collections.abc import Mapping
from typing import Any

from qlora.data.reading import record_fields
from qlora.data.types import TEXT, Message, Record, RecordError


class Text:
    """Records of plain text."""

    def matches(self, fields: Mapping[str, Any]) -> bool:
        """Whether the columns are those of this format."""
        return "text" in fields

    def messages(self, record: Record) -> list[Message]:
        """One TEXT message. RecordError if the text is missing or empty."""
        text = record_fields.text(record.fields, "text")
        if not text.strip():
            raise RecordError("empty text")
        return [Message(TEXT, text, True)]
