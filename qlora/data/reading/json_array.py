"""A streaming reader of JSON arrays: memory is that of one object and one block, whatever the size of the file."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from qlora.data.reading.strict_json import DECODER, MAX_RECORD_BYTES, check, decoder_error
from qlora.data.types import RecordError

BLOCK_BYTES = 2**20
_TOO_LARGE = "record too large"
_REST_UNREAD = "the rest of the file is not read"


def items(file: BinaryIO, block_bytes: int = BLOCK_BYTES) -> Iterator[dict[str, Any] | RecordError]:
    """The objects of the array in `file`, one by one, with a RecordError in place of each that can't be used.

    `file` is at its beginning, after a byte-order mark.
    """
    window = _Window(file, block_bytes)
    try:
        window.peek()
        window.take()  # the opening bracket
        while (sign := window.peek()) not in ("", "]"):
            yield window.item()
            if (sign := window.peek()) not in (",", "]"):
                problem = f"a comma or a bracket is missing at character {window.position}; {_REST_UNREAD}"
                raise RecordError("not JSON", problem)
            if sign == ",":
                window.take()
        if not sign or window.take() != "]" or window.peek():
            yield RecordError("not JSON", "the array does not end where the file ends")
    except RecordError as error:
        yield error


class _Window:
    """The part of a file that has been read and not yet consumed."""

    def __init__(self, file: BinaryIO, block_bytes: int) -> None:
        self._file, self._block_bytes = file, block_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes_before = 0  # before this block, for errors
        self._chars_before = 0  # before `_text`
        self._text, self._at, self._ended = "", 0, False

    @property
    def position(self) -> int:
        """The number of the next character in the file, from 1."""
        return self._chars_before + self._at + 1

    def peek(self) -> str:
        """The next character that is not whitespace; empty at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_block():
                return ""

    def take(self) -> str:
        """Consume the next character."""
        self._at += 1
        return self._text[self._at - 1]

    def item(self) -> dict[str, Any] | RecordError:
        """The value that starts here. A RecordError is raised if its end can't be found, returned if it is unusable."""
        while True:
            value, end = self._decode()
            held = len(self._text) - self._at
            if end is not None and (end < len(self._text) or self._ended):
                size, self._at = end - self._at, end
                return (
                    RecordError(_TOO_LARGE, f"at most {MAX_RECORD_BYTES} bytes") if size > MAX_RECORD_BYTES else value
                )
            if held > MAX_RECORD_BYTES:
                problem = f"at most {MAX_RECORD_BYTES} bytes, or its end is missing; {_REST_UNREAD}"
                raise RecordError(_TOO_LARGE, problem)
            if not self._read_block() and end is None:
                assert isinstance(value, RecordError)
                raise RecordError(value.reason, f"{value.detail}; {_REST_UNREAD}")

    def _decode(self) -> tuple[dict[str, Any] | RecordError, int | None]:
        """The value that starts here and where it ends; None if the text read so far does not contain its end."""
        try:
            value, end = DECODER.raw_decode(self._text, self._at)
            return check(value, self._text[self._at : end]), end
        except RecordError as error:
            problem = error
        except json.JSONDecodeError as error:
            return RecordError("not JSON", f"{error.msg} at character {self._chars_before + error.pos + 1}"), None
        except (ValueError, RecursionError) as error:
            problem = decoder_error(error)
        try:
            return problem, json.JSONDecoder().raw_decode(self._text, self._at)[1]
        except (ValueError, RecursionError):
            return problem, None

    def _read_block(self) -> bool:
        """Read one more block; False at the end of the file. RecordError for bytes that are not text."""
        if self._ended:
            return False
        block = self._file.read(self._block_bytes)
        if b"\0" in block:
            raise RecordError("NUL character", f"at byte {self._bytes_before + block.index(0) + 1}; {_REST_UNREAD}")
        try:
            text = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            pending = len(error.object) - len(block)  # bytes of a character that started in the block before
            at = self._bytes_before - pending + error.start + 1
            raise RecordError("not UTF-8", f"at byte {at}; {_REST_UNREAD}") from None
        self._bytes_before += len(block)
        self._chars_before += self._at
        self._text, self._at, self._ended = self._text[self._at :] + text, 0, not block
        return bool(block)
