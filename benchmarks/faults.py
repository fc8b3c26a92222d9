"""The fault table: every promise of not losing, not breaking and not letting in, at full size.  `make faults`

Each part writes its counts to results/faults.json as it goes. `--part NAME` runs one, `--share 0.1` a tenth of it.
The same code runs at a small size in every `make test` (tests/fault_injection/).
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
from bench import RESULTS, machine
from fault_table import draw
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
WRITTEN_SECONDS = 5.0  # between two lines of progress


class Home:
    """Where the faults happen: a folder in memory if there is one, a tiny model, and a finished run to spoil."""

    def __init__(self) -> None:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(prefix="faults-", dir=memory))
        self.model = save_model(self.folder / "model", "llama")
        self._scene: malicious_files.Scene | None = None

    @property
    def scene(self) -> malicious_files.Scene:
        """A base, rows and a finished run."""
        if self._scene is None:
            self._scene = malicious_files.scene_in(self.folder, self.model)
        return self._scene


def _damaged(home: Home, share: float, report: Report) -> corruption.Found:
    """Half in a checkpoint, half in a finished run."""
    total = corruption.Found()
    for folder in (max(home.scene.run.glob("checkpoint-*")), home.scene.run):
        found = corruption.damage(folder, int(500 * share), int(150 * share), 0, lambda found: None)
        total.flips, total.cuts = total.flips + found.flips, total.cuts + found.cuts
        total.undetected, total.notes = total.undetected + found.undetected, total.notes + found.notes
        report(total)
    return total


def _resumed(home: Home, share: float, report: Report) -> resume_difference.Found:
    chosen = list(resume_difference.cases())
    return resume_difference.resume_all(home.model, home.folder, chosen[:: max(1, round(1 / share))], (1, 3, 5), report)


def _of(count: int, share: float) -> int:
    return max(1, round(count * share))


PARTS: dict[str, Callable[[Home, float, Report], Any]] = {
    "templates": lambda home, share, report: hostile_templates.render_all(home.folder, slice(None), report),
    "flips and cuts": _damaged,
    "path names": lambda home, share, report: hostile_names.follow_all(
        home.scene, home.folder, _of(300, share), 0, report
    ),
    "secrets": lambda home, share, report: planted_secrets.search(home.model, home.folder, 0, report),
    "mutants": lambda home, share, report: mutations.mutate_all(home.scene, home.folder, _of(10_000, share), 0, report),
    "kills at calls": lambda home, share, report: kills.kill_at_calls(home.folder, max(1, round(1 / share)), 1, report),
    "placements": lambda home, share, report: malicious_files.place_all(
        home.scene, home.folder, slice(None, None, max(1, round(1 / share))), report
    ),
    "resumes": _resumed,
    "poison, 1 process": lambda home, share, report: non_finite.poison(
        home.model, home.folder, _of(150, share), 0, report
    ),
    "poison, 2 processes": lambda home, share, report: non_finite.poison(
        home.model, home.folder, _of(50, share), 1, report, world=2
    ),
    "signals, 1 process": lambda home, share, report: stop_signals.stop(
        home.model, home.folder, _of(240, share), 0, report
    ),
    "signals, 2 processes": lambda home, share, report: stop_signals.stop(
        home.model, home.folder, _of(48, share), 1, report, world=2
    ),
    "signals, launcher": lambda home, share, report: stop_signals.stop_launched(
        home.model, home.folder, _of(50, share), 2, report
    ),
    "ranks that die": lambda home, share, report: failed_ranks.part(
        home.model, home.folder, _of(100, share), 3, report
    ),
    "kills at moments": lambda home, share, report: kills.kill_at_moments(
        home.model, home.folder, _of(500, share), 0, report
    ),
}


class Record:
    """results/faults.json: the machine, and each part's counts as they are now."""

    def __init__(self) -> None:
        self.path = RESULTS / "faults.json"
        self.content: dict[str, Any] = {"machine": machine(), "parts": {}}
        if self.path.exists():
            self.content["parts"] = json.loads(self.path.read_text())["parts"]
        self._written = 0.0

    def put(self, part: str, found: Any, seconds: float, done: bool) -> None:
        """Keep the counts of a part; write them at most every WRITTEN_SECONDS, and at its end."""
        counts = {key: value for key, value in asdict(found).items() if key != "notes"}
        notes = found.notes if isinstance(found.notes, list) else [f"{n} x {text}" for text, n in found.notes.items()]
        entry = {**counts, "clean": found.clean, "done": done, "seconds": round(seconds, 1), "notes": notes[:20]}
        self.content["parts"][part] = entry
        if done or time.monotonic() - self._written > WRITTEN_SECONDS:
            self._written = time.monotonic()
            RESULTS.mkdir(exist_ok=True)
            self.path.write_text(json.dumps(self.content, indent=2) + "\n")
            print(f"{part}: {'clean' if found.clean else 'NOT CLEAN'} {counts}", flush=True)


def main() -> int:
    """Run the parts; the exit code is 1 if one of them is not clean."""
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("--part", action="append", choices=[*PARTS], help="only this one; may be repeated")
    reader.add_argument("--share", type=float, default=1.0, help="of the full size")
    chosen = reader.parse_args()
    record, home = Record(), Home()
    try:
        for part in chosen.part or PARTS:
            _run(part, chosen.share, home, record)
    finally:
        shutil.rmtree(home.folder, ignore_errors=True)
    draw(record.content["parts"])
    parts = record.content["parts"]
    return int(not all(part in parts and parts[part]["clean"] and parts[part]["done"] for part in chosen.part or PARTS))


def _run(part: str, share: float, home: Home, record: Record) -> None:
    started = time.monotonic()
    try:
        found = PARTS[part](home, share, lambda found: record.put(part, found, time.monotonic() - started, done=False))
    except Exception as error:  # the other parts are measured all the same; this one stays not done
        print(f"{part}: stopped by {error!r}", flush=True)
        return
    record.put(part, found, time.monotonic() - started, done=True)


if __name__ == "__main__":
    sys.exit(main())
