"""Redaction of secrets in every text for a log, a tracker, a model card, a file or a crash report.

Three kinds of secrets: values of environment variables that are named like secrets, known shapes of tokens, and what
follows `password=` or `Authorization:` or precedes the `@` of a URL.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, TextIO
from urllib.parse import quote

MARK = "[redacted]"
MIN_CHARS = 8  # of a variable's value; shorter ones would match ordinary words

_NAMED = re.compile(r"(?:^|_)(?:TOKENS?|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|KEY|PAT|PWD)(?:_|$)|API_?KEY")
_PATH_STARTS = ("/", "~", "./", "\\")  # a value that starts like this is the path of a secret
# How each shape begins -> what follows. All at once take a microsecond a character: a text is searched for those only
# whose beginning it contains.
_SHAPES = {
    "hf_": r"[A-Za-z0-9]{16,}", "api_org_": r"[A-Za-z0-9]{16,}",  # Hugging Face
    "sk-": r"[\w-]{16,}", "nvapi-": r"[\w-]{16,}", "AIza": r"[\w-]{30,}", "ya29.": r"[\w.-]{16,}",
    **dict.fromkeys(("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"[A-Za-z0-9]{20,}"),
    "github_pat_": r"\w{20,}", "glpat-": r"[\w-]{16,}",
    "AKIA": r"[A-Z0-9]{16}\b", "ASIA": r"[A-Z0-9]{16}\b", "xox": r"[abeoprs]-[\w-]{10,}",
    **{f"{kind}_{mode}_": r"[A-Za-z0-9]{16,}" for kind in ("sk", "rk", "pk") for mode in ("live", "test")},
    "npm_": r"[A-Za-z0-9]{30,}", "pypi-": r"[\w-]{16,}", "SG.": r"[\w-]{16,}\.[\w-]{16,}", "r8_": r"[A-Za-z0-9]{30,}",
    "eyJ": r"[\w-]{8,}\.[\w-]{8,}\.[\w-]+",  # a JSON web token
    "-----BEGIN ": r"[A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
}  # fmt: skip
_AFTER = re.compile(  # the first letters again in front: most places are ruled out by them, four times as fast
    r"(?i)(?=[abpts])(\bauthorization[\"']?\s*[:=]\s*[\"']?(?:\w+\s+)?|\bbearer\s+|passw(?:or)?d[\"']?\s*[:=]\s*[\"']?"
    r"|(?:token|secret|api[_-]?key|access[_-]?key)[\"']?\s*[:=]\s*[\"']?(?=[^\s\"']*\d))"
    r"([\w.~+/=!#$%^*-]{6,})"
)
# One slash as well: a path that was made from a URL has only one.
_IN_URL = re.compile(r"\b([a-z][a-z0-9+.-]*:(?://|/(?=[^\s/@]+:)))[^\s/@\"'<>]+@", re.IGNORECASE)


def redacted(text: str) -> str:
    """`text` with every secret in it replaced by `[redacted]`."""
    return _redacted(text, _pattern_of(tuple(_secrets())))


def redacted_values(value: Any) -> Any:
    """Plain values (dicts, lists, texts, numbers) with every text in them redacted, keys included."""
    return _redacted_values(value, _pattern_of(tuple(_secrets())))


def _redacted(text: str, environment: re.Pattern[str] | None) -> str:
    if environment:
        text = environment.sub(MARK, text)
    if beginnings := tuple(filter(text.__contains__, _SHAPES)):
        text = _shape_of(beginnings).sub(MARK, text)
    text = _IN_URL.sub(rf"\1{MARK}@", text)
    return _AFTER.sub(rf"\1{MARK}", text)


def _redacted_values(value: Any, environment: re.Pattern[str] | None) -> Any:
    if isinstance(value, str):
        return _redacted(value, environment)
    if isinstance(value, Mapping):
        pairs = value.items()
        return {_redacted_values(key, environment): _redacted_values(item, environment) for key, item in pairs}
    if isinstance(value, list | tuple):
        return type(value)(_redacted_values(item, environment) for item in value)
    return value


class RedactedStream:
    """A text stream that redacts what is written; everything else is passed on to the stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` redacted."""
        self._stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each line redacted."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _secrets() -> Iterator[str]:
    """Values of environment variables that are named like secrets."""
    for name, value in os.environ.items():
        if len(value) >= MIN_CHARS and _NAMED.search(name.upper()) and not value.startswith(_PATH_STARTS):
            yield value


@lru_cache(maxsize=64)
def _shape_of(beginnings: tuple[str, ...]) -> re.Pattern[str]:
    """One pattern for the shapes that begin so. Only a private key may follow a letter."""
    shapes = (("" if start.startswith("-") else r"\b") + re.escape(start) + _SHAPES[start] for start in beginnings)
    return re.compile("|".join(shapes), re.DOTALL)


@lru_cache(maxsize=8)
def _pattern_of(secrets: tuple[str, ...]) -> re.Pattern[str] | None:
    """One pattern for all secrets, plain and as JSON, Python and URLs escape them; the longest first."""
    escapes = (lambda text: text, lambda text: json.dumps(text)[1:-1], lambda text: repr(text)[1:-1], quote)
    forms = {escape(secret) for secret in secrets for escape in escapes}
    longest_first = sorted(forms, key=lambda form: (-len(form), form))
    return re.compile("|".join(map(re.escape, longest_first))) if forms else None
