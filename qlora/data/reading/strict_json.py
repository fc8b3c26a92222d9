"""Strict JSON: one object from one piece of text, or a RecordError with the reason."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from qlora.data.types import RecordError

MAX_RECORD_BYTES = 4 * 2**20  # about a million tokens: no record of a fine-tuning data set is longer
MAX_DEPTH = 32  # nested tool schemas need about ten

_SURROGATE = re.compile(r"\\u[dD][89abAB]|\\u[dD][c-fC-F]")


def parse(line: bytes) -> dict[str, Any]:
    """The object in `line`. RecordError for anything else, hostile or broken."""
    text = decode(line)
    try:
        value, end = DECODER.raw_decode(text, _skip_space(text, 0))
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:
        raise decoder_error(error) from None
    if _skip_space(text, end) != len(text):
        raise RecordError("more than one value on the line", f"the first ends at column {end}")
    return check(value, text)


def decode(raw: bytes) -> str:
    """`raw` as text. RecordError if it is not UTF-8 or has a NUL byte."""
    if b"\0" in raw:
        raise RecordError("NUL character", f"at byte {raw.index(0) + 1}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError("not UTF-8", f"at byte {error.start + 1}") from None


def decoder_error(error: Exception) -> RecordError:
    """The RecordError for an exception of the standard decoder."""
    if isinstance(error, json.JSONDecodeError):
        column = min(error.pos, len(error.doc.rstrip())) + 1  # an incomplete line ends before its line break
        return RecordError("not JSON", f"{error.msg} at column {column}")
    if isinstance(error, RecursionError):
        return RecordError("nested too deep", f"at most {MAX_DEPTH} levels")
    return RecordError("number out of range", str(error).split(";")[0][:80])


def check(value: Any, text: str) -> dict[str, Any]:
    """`value`, which was read from `text`. RecordError unless it is an object of limited depth with valid strings."""
    if not isinstance(value, dict):
        raise RecordError("not an object", f"found {_KINDS.get(type(value), type(value).__name__)}")
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise RecordError("nested too deep", f"at most {MAX_DEPTH} levels")
    if "\\u0000" in text and any("\0" in string for string in strings(value)):
        raise RecordError("NUL character", "written as \\u0000")
    if _SURROGATE.search(text) and any(_has_surrogate(string) for string in strings(value)):
        raise RecordError("lone surrogate", "half of a UTF-16 pair is no character")
    return value


def strings(value: Any) -> Iterator[str]:
    """Every string in `value`, keys included, at any depth."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)


_KINDS = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean", type(None): "null"}


def _depth(value: Any) -> int:
    deepest, stack = 0, [(value, 1)]
    while stack:
        item, level = stack.pop()
        deepest = max(deepest, level)
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        stack.extend((child, level + 1) for child in children)
    return deepest


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start] in " \t\r\n":
        start += 1
    return start


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise RecordError("duplicate key", repr(next(key for key in keys if keys.count(key) > 1)))
    return value


def _no_constant(name: str) -> NoReturn:
    raise RecordError("NaN or Infinity", f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise RecordError("number out of range", text[:40])
    return number


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite)
