"""Strict JSON: one object out of one piece of text, or a RowError that says why not."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from qlora.data.types import RecordError

MAX_ROW_BYTES = 4 * 2**20  # about a million tokens: no row of a fine-tune is longer
MAX_DEPTH = 32  # nested tool schemas need about ten

_SURROGATE = re.compile(r"\\u[dD][89abAB]|\\u[dD][c-fC-F]")


def parse(line: bytes) -> dict[str, Any]:
    """The object that `line` holds. RowError for anything else, hostile or broken."""
    text = decode(line)
    try:
        value, end = DECODER.raw_decode(text, _skip_space(text, 0))
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:
        raise unreadable(error) from None
    if _skip_space(text, end) != len(text):
        raise RecordError("more than one value on the line", f"the first ends at column {end}")
    return checked(value, text)


def decode(raw: bytes) -> str:
    """`raw` as text. RowError if it is not UTF-8 or holds a NUL byte."""
    if b"\0" in raw:
        raise RecordError("NUL character", f"at byte {raw.index(0) + 1}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError("not UTF-8", f"at byte {error.start + 1}") from None


def unreadable(error: Exception) -> RecordError:
    """The RowError for what the standard decoder raised."""
    if isinstance(error, json.JSONDecodeError):
        column = min(error.pos, len(error.doc.rstrip())) + 1  # a line that breaks off does so before its line end
        return RecordError("not JSON", f"{error.msg} at column {column}")
    if isinstance(error, RecursionError):
        return RecordError("nested too deep", f"at most {MAX_DEPTH} levels")
    return RecordError("number out of range", str(error).split(";")[0][:80])


def checked(value: Any, text: str) -> dict[str, Any]:
    """`value`, read from `text`, if it is an object of bounded depth and clean strings."""
    if not isinstance(value, dict):
        raise RecordError("not an object", f"found {_KINDS.get(type(value), type(value).__name__)}")
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise RecordError("nested too deep", f"at most {MAX_DEPTH} levels")
    if "\\u0000" in text and any("\0" in part for part in strings(value)):
        raise RecordError("NUL character", "written as \\u0000")
    if _SURROGATE.search(text) and any(_has_surrogate(part) for part in strings(value)):
        raise RecordError("lone surrogate", "half of a UTF-16 pair is no character")
    return value


def strings(value: Any) -> Iterator[str]:
    """Every string in `value`, keys included, however deep."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            todo.extend(item)
            todo.extend(item.values())
        elif isinstance(item, list | tuple):
            todo.extend(item)


_KINDS = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean", type(None): "null"}


def _depth(value: Any) -> int:
    deepest, todo = 0, [(value, 1)]
    while todo:
        item, level = todo.pop()
        deepest = max(deepest, level)
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        todo.extend((part, level + 1) for part in inner)
    return deepest


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start] in " \t\r\n":
        start += 1
    return start


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise RecordError("duplicate key", repr(next(key for key in keys if keys.count(key) > 1)))
    return found


def _no_constant(name: str) -> NoReturn:
    raise RecordError("NaN or Infinity", f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise RecordError("number out of range", text[:40])
    return number


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite)
