"""What a resolved recipe says, read from its text: the block YAML that `recipe.yaml` is written in, and no more.

Only for showing: the strict reader is config/. What this one can't read it leaves out.
"""

import re
from collections.abc import Sequence

_ENTRY = re.compile(r"^(?P<indent> *)(?P<item>- )?(?:(?P<key>[\w.-]+):(?: +(?P<value>.*))?|(?P<bare>.+))$")


def settings(recipe_text: str) -> dict[str, str]:
    """Dotted key -> scalar as written, quotes taken off; list items are numbered: data.train.0.path."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []  # (column, key) of the mappings and list items the line is within
    counts: dict[str, int] = {}
    for line in recipe_text.splitlines():
        entry = _ENTRY.match(_without_comment(line))
        if not entry:
            continue
        column = len(entry["indent"])
        # PyYAML writes list items at the column of their key, so an item only leaves what is deeper than that.
        path = [(at, key) for at, key in path if at < column or (entry["item"] and at == column and not key.isdigit())]
        if entry["item"]:
            owner = ".".join(key for _, key in path)
            counts[owner] = counts.get(owner, -1) + 1
            path.append((column, str(counts[owner])))
            column += 2
        if entry["key"]:
            path.append((column, entry["key"]))
        value = (entry["value"] if entry["key"] else entry["bare"]) or ""
        if value:
            found[".".join(key for _, key in path)] = _unquoted(value.strip())
    return found


def differing(texts: Sequence[str]) -> dict[str, list[str]]:
    """The settings that are not the same in all recipes, each with its value in every one (empty where unset)."""
    read = [settings(text) for text in texts]
    keys = dict.fromkeys(key for recipe in read for key in recipe)
    rows = {key: [recipe.get(key, "") for recipe in read] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _without_comment(line: str) -> str:
    """The line up to a comment; a # within quotes in a resolved recipe is left to the strict reader."""
    if '"' in line or "'" in line:
        return line.rstrip()
    return re.sub(r"(^|\s)#.*$", "", line).rstrip()


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
