"""Fault injection at full size: kills, signals, non-finite values, damage, attacks and mutations.  `make faults`

Each part writes its counts to results/faults.json as it goes. `--part NAME` runs one, `--share 0.1` a tenth of it.
`make test` runs the same code with small counts (tests/fault_injection/).
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  offline, one thread
from fault_table import KEYS, draw
from harness import RESULTS, machine
from support.faults import (
    corruption,
    failed_ranks,
    hostile_names,
    hostile_templates,
    kills,
    malicious_files,
    mutations,
    non_finite,
    planted_secrets,
    resume_difference,
    stop_signals,
)
from support.tiny_models import save_model

Report = Callable[[Any], None]
WRITE_SECONDS = 5.0  # between two lines of progress


class Home:
    """A temporary folder (in memory if possible) with a tiny model and a finished run to damage."""

    def __init__(self) -> None:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(prefix="faults-", dir=memory))
        self.model = save_model(self.folder / "model", "llama")
        self._scene: malicious_files.Workspace | None = None

    @property
    def workspace(self) -> malicious_files.Workspace:
        """A base, rows and a finished run."""
        if self._scene is None:
            self._scene = malicious_files.make_workspace(self.folder, self.model)
        return self._scene


def _damage(home: Home, share: float, report: Report) -> corruption.Result:
    """Half in a checkpoint, half in a finished run."""
    total = corruption.Result()
    for folder in (max(home.workspace.run.glob("checkpoint-*")), home.workspace.run):
        result = corruption.damage_files(folder, int(500 * share), int(150 * share), 0, lambda result: None)
        total.flips, total.cuts = total.flips + result.flips, total.cuts + result.cuts
        total.undetected, total.notes = total.undetected + result.undetected, total.notes + result.notes
        report(total)
    return total


def _resume(home: Home, share: float, report: Report) -> resume_difference.Result:
    selection = list(resume_difference.cases())[:: _stride(share)]
    return resume_difference.resume_all(home.model, home.folder, selection, (1, 3, 5), report)


def _count(full: int, share: float) -> int:
    return max(1, round(full * share))


def _stride(share: float) -> int:
    return max(1, round(1 / share))


PARTS: dict[str, Callable[[Home, float, Report], Any]] = {
    "templates": lambda home, share, report: hostile_templates.render_all(home.folder, slice(None), report),
    "flips and cuts": _damage,
    "path names": lambda home, share, report: hostile_names.open_all(
        home.workspace, home.folder, _count(300, share), 0, report
    ),
    "secrets": lambda home, share, report: planted_secrets.search(home.model, home.folder, 0, report),
    "mutants": lambda home, share, report: mutations.mutate_all(
        home.workspace, home.folder, _count(10_000, share), 0, report
    ),
    "kills at calls": lambda home, share, report: kills.kill_at_calls(home.folder, max(1, round(1 / share)), 1, report),
    "placements": lambda home, share, report: malicious_files.place_all(
        home.workspace, home.folder, slice(None, None, _stride(share)), report
    ),
    "resumes": _resume,
    "poison, 1 process": lambda home, share, report: non_finite.inject_non_finite(
        home.model, home.folder, _count(150, share), 0, report
    ),
    "poison, 2 processes": lambda home, share, report: non_finite.inject_non_finite(
        home.model, home.folder, _count(50, share), 1, report, world=2
    ),
    "signals, 1 process": lambda home, share, report: stop_signals.send_signals(
        home.model, home.folder, _count(240, share), 0, report
    ),
    "signals, 2 processes": lambda home, share, report: stop_signals.send_signals(
        home.model, home.folder, _count(48, share), 1, report, world=2
    ),
    "signals, launcher": lambda home, share, report: stop_signals.signal_launchers(
        home.model, home.folder, _count(50, share), 2, report
    ),
    "ranks that die": lambda home, share, report: failed_ranks.fail_ranks(
        home.model, home.folder, range(_count(100, share)), 3, report
    ),
    "kills at moments": lambda home, share, report: kills.kill_at_moments(
        home.model, home.folder, _count(500, share), 0, report
    ),
}


class Record:
    """results/faults.json: the machine, and the current counts of each part."""

    def __init__(self) -> None:
        self.path = RESULTS / "faults.json"
        self.content: dict[str, Any] = {"machine": machine(), "parts": {}}
        if self.path.exists():
            self.content["parts"] = json.loads(self.path.read_text())["parts"]
        self._written = 0.0

    def put(self, part: str, result: Any, seconds: float, done: bool) -> None:
        """Store the counts of a part; write the file at most every WRITE_SECONDS, and at the part's end."""
        counts = {KEYS.get(name, name): value for name, value in asdict(result).items() if name != "notes"}
        notes = (
            result.notes if isinstance(result.notes, list) else [f"{n} x {text}" for text, n in result.notes.items()]
        )
        entry = {**counts, "clean": result.clean, "done": done, "seconds": round(seconds, 1), "notes": notes[:20]}
        self.content["parts"][part] = entry
        if done or time.monotonic() - self._written > WRITE_SECONDS:
            self._written = time.monotonic()
            RESULTS.mkdir(exist_ok=True)
            self.path.write_text(json.dumps(self.content, indent=2) + "\n")
            print(f"{part}: {'clean' if result.clean else 'NOT CLEAN'} {counts}", flush=True)


def main() -> int:
    """Run the parts; the exit code is 1 if one of them is not clean."""
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("--part", action="append", choices=[*PARTS], help="only this one; may be repeated")
    reader.add_argument("--share", type=float, default=1.0, help="of the full size")
    options = reader.parse_args()
    record, home = Record(), Home()
    try:
        for part in options.part or PARTS:
            _run(part, options.share, home, record)
    finally:
        shutil.rmtree(home.folder, ignore_errors=True)
    draw(record.content["parts"])
    parts = record.content["parts"]
    return int(
        not all(part in parts and parts[part]["clean"] and parts[part]["done"] for part in options.part or PARTS)
    )


def _run(part: str, share: float, home: Home, record: Record) -> None:
    started = time.monotonic()
    try:
        result = PARTS[part](
            home, share, lambda result: record.put(part, result, time.monotonic() - started, done=False)
        )
    except Exception as error:  # the other parts still run; this one stays unfinished
        print(f"{part}: stopped by {error!r}", flush=True)
        return
    record.put(part, result, time.monotonic() - started, done=True)


if __name__ == "__main__":
    sys.exit(main())
