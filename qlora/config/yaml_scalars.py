"""Types of plain YAML text: number, boolean or null as in the core schema of YAML 1.2, where PyYAML follows 1.1."""

import re

MAX_DIGITS = 40  # characters of a number
NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")

_RULES = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
TYPES = [(f"tag:yaml.org,2002:{name}", re.compile(rf"(?:{rule})\Z")) for name, rule in _RULES.items()]


def number(text: str, tag: str) -> int | float:
    """The number that a text of at most MAX_DIGITS characters is; `012` is twelve."""
    if tag.endswith(":int"):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    return float(text.replace(".", "") if text.lstrip("-+.").isalpha() else text)
