"""text: a document, trained whole, with the end token after it."""

from collections.abc import Mapping
from typing import Any

from qlora.data.reading import record_fields
from qlora.data.types import TEXT, Message, Record, RecordError


class Text:
    """Rows of plain text."""

    def matches(self, fields: Mapping[str, Any]) -> bool:
        """Whether the columns are those of this format."""
        return "text" in fields

    def messages(self, row: Record) -> list[Message]:
        """One message that is the document. RowError if there is none."""
        document = record_fields.text(row.fields, "text")
        if not document.strip():
            raise RecordError("empty text")
        return [Message(TEXT, document, True)]
