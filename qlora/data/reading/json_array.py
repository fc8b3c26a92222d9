"""The objects of a JSON array, decoded while the file is read: what is held is one object, whatever the file's size."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from qlora.data.reading.strict_json import DECODER, MAX_ROW_BYTES, checked, unreadable
from qlora.data.types import RecordError

_PIECE_BYTES = 2**20
_TOO_LARGE = "row too large"
_LOST = "the rest of the file is not read"


def items(file: BinaryIO) -> Iterator[dict[str, Any] | RecordError]:
    """The objects of the array in `file`, one by one; a RowError in the place of each that can't be used.

    `file` stands at its beginning, a byte-order mark behind it.
    """
    window = _Window(file)
    try:
        window.peek()
        window.take()  # the opening bracket
        while (sign := window.peek()) not in ("", "]"):
            yield window.item()
            if (sign := window.peek()) not in (",", "]"):
                raise RecordError("not JSON", f"a comma or a bracket is missing at character {window.place}; {_LOST}")
            if sign == ",":
                window.take()
        if not sign or window.take() != "]" or window.peek():
            yield RecordError("not JSON", "the array does not end where the file ends")
    except RecordError as error:
        yield error


class _Window:
    """The text of a file from where the reader stands, as far as it was needed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes_before = 0  # of this piece, for errors
        self._dropped = 0  # characters
        self._text, self._at, self._ended = "", 0, False

    @property
    def place(self) -> int:
        """The character of the file that comes next, from 1."""
        return self._dropped + self._at + 1

    def peek(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self) -> str:
        """Step over the next character."""
        self._at += 1
        return self._text[self._at - 1]

    def item(self) -> dict[str, Any] | RecordError:
        """The value that begins here. RowError raised if its end can't be found, returned if it can't be used."""
        while True:
            found, end = self._decoded()
            held = len(self._text) - self._at
            if end is not None and (end < len(self._text) or self._ended):
                size, self._at = end - self._at, end
                return RecordError(_TOO_LARGE, f"at most {MAX_ROW_BYTES} bytes") if size > MAX_ROW_BYTES else found
            if held > MAX_ROW_BYTES:
                raise RecordError(_TOO_LARGE, f"at most {MAX_ROW_BYTES} bytes, or its end is missing; {_LOST}")
            if not self._more() and end is None:
                assert isinstance(found, RecordError)
                raise RecordError(found.reason, f"{found.detail}; {_LOST}")

    def _decoded(self) -> tuple[dict[str, Any] | RecordError, int | None]:
        """What the text says here, and where it ends; no end if there is none in what was read so far."""
        try:
            value, end = DECODER.raw_decode(self._text, self._at)
            return checked(value, self._text[self._at : end]), end
        except RecordError as error:
            found = error
        except json.JSONDecodeError as error:
            return RecordError("not JSON", f"{error.msg} at character {self._dropped + error.pos + 1}"), None
        except (ValueError, RecursionError) as error:
            found = unreadable(error)
        try:
            return found, json.JSONDecoder().raw_decode(self._text, self._at)[1]
        except (ValueError, RecursionError):
            return found, None

    def _more(self) -> bool:
        """Read another piece; False at the end of the file. RowError for bytes that are no text."""
        if self._ended:
            return False
        piece = self._file.read(_PIECE_BYTES)
        if b"\0" in piece:
            raise RecordError("NUL character", f"at byte {self._bytes_before + piece.index(0) + 1}; {_LOST}")
        try:
            text = self._decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            waiting = len(error.object) - len(piece)  # bytes of a character that the piece before began
            at = self._bytes_before - waiting + error.start + 1
            raise RecordError("not UTF-8", f"at byte {at}; {_LOST}") from None
        self._bytes_before += len(piece)
        self._dropped += self._at
        self._text, self._at, self._ended = self._text[self._at :] + text, 0, not piece
        return bool(piece)
