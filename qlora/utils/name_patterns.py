r"""Patterns for the path of a module: a name, the end of a path, or a regular expression, as PEFT's `rank_pattern`."""

import re


def matches(pattern: str, path: str) -> bool:
    r"""Whether a pattern matches the module at `path`: where `^(.*\.)?(PATTERN)$` does."""
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", path) is not None
