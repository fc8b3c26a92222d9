"""The findings of `qlora check`: errors as locations and messages, and many findings as few lines. Imports no torch."""

import re
from collections.abc import Sequence
from typing import Any

from qlora.errors import QloraError
from qlora.recipe.check_paths import read_checked
from qlora.recipe.recipe import Recipe

LOCATION = re.compile(r"(?P<where>(?:[^:\n]+:\d+|command line|[\w./\\-]+)): (?P<message>.+)", re.DOTALL)
LINE_NUMBER = re.compile(r":\d+$")  # the end of a record's location
END_OF_REASON = re.compile(r"[:.] ")
SHOWN = 5  # findings of a kind that are printed
Finding = dict[str, str]


def check_settings(path: str, overrides: Sequence[str]) -> tuple[Recipe | None, dict[str, Any]]:
    """The recipe, and the object of `check --json` so far: settings and paths. None if they have a problem."""
    result: dict[str, Any] = {"ok": False, "problems": [], "warnings": [], "data": None, "memory": None}
    try:
        recipe, notes = read_checked(path, overrides)
    except QloraError as error:
        result["problems"] = findings_from_error(error)
        return None, result
    result["warnings"] = [{"where": "recipe", "message": note} for note in notes]
    return recipe, result


def summarize_findings(findings: Sequence[Finding]) -> list[str]:
    """Findings as lines: of each kind the first few, with a count of the rest; of overlong examples the longest."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kind = END_OF_REASON.split(finding["message"])[0]
        kinds.setdefault(kind if LINE_NUMBER.search(finding["where"]) else f"{finding}", []).append(finding)
    lines = []
    for kind, group in kinds.items():
        ordered = sorted(group, key=_tokens, reverse=True) if kind in ("dropped, overlong", "truncated") else group
        lines += [": ".join(filter(None, (finding["where"], finding["message"]))) for finding in ordered[:SHOWN]]
        if len(group) > SHOWN:
            lines.append(f"{kind}: {len(group) - SHOWN:,} more records; `qlora check --json` lists all")
    return lines


def _tokens(finding: Finding) -> int:
    match = re.search(r": (\d+) tokens", finding["message"])
    return int(match[1]) if match else 0


def findings_from_error(error: QloraError) -> list[Finding]:
    """The lines of an error as locations and messages."""
    lines = str(error).splitlines()
    matches = [LOCATION.fullmatch(line) for line in lines]
    return [
        {"where": match["where"], "message": match["message"]} if match else {"where": "", "message": line}
        for match, line in zip(matches, lines, strict=True)
    ]
