"""A report of checks on a GPU: every check is right, wrong, or was left out, and is written at once."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import RESULTS, write

Check = Callable[[], dict[str, Any] | bool]  # what it measured, with `right`; or whether it is right


class Report:
    """The checks of one item; those that a file of an earlier call holds are not repeated, unless they were wrong."""

    def __init__(self, name: str, seconds: float = 8 * 60, folder: Path = RESULTS) -> None:
        self.name, self.folder = name, folder
        self.ends = time.monotonic() + seconds
        path = folder / f"{name}.json"
        entries = json.loads(path.read_text())["checks"] if path.exists() else {}
        self.checks: dict[str, dict[str, Any]] = {what: entry for what, entry in entries.items() if entry["right"]}
        self.complete = True

    def check(self, what: str, run: Check) -> None:
        """Run a check, unless it has a result or the time is up, and write what it gave. An error is a wrong result."""
        if what in self.checks:
            return
        if time.monotonic() > self.ends:
            self.complete = False
            return
        started = time.monotonic()
        try:
            result = run()
            entry = {"right": result} if isinstance(result, bool) else result
        except Exception as error:  # a benchmark goes on with what is left
            lines = str(error).strip().splitlines() or [""]
            entry = {"right": False, "error": f"{type(error).__name__}: {lines[0]}"}
        self.checks[what] = {**entry, "check_seconds": round(time.monotonic() - started, 1)}
        print(f"  {'right' if entry['right'] else 'WRONG'}  {what}: {self.checks[what]}", flush=True)
        self.save()

    def save(self) -> None:
        """Write what there is."""
        write(self.name, {"complete": self.complete, "checks": self.checks}, self.folder)


def verdict(name: str, folder: Path = RESULTS) -> str:
    """`right (7 checks)`, `WRONG: ...`, or what is missing, from the results of an item."""
    path = folder / f"{name}.json"
    if not path.exists():
        return "no result"
    results = json.loads(path.read_text())
    checks = results.get("checks")
    if checks is None:
        return "measured"
    wrong = [what for what, entry in checks.items() if not entry["right"]]
    if wrong:
        return f"WRONG: {'; '.join(wrong)}"
    return f"right ({len(checks)} checks)" if results["complete"] else f"right so far ({len(checks)} checks)"
