"""Hostile file names inside indexes and manifests: is a file outside the folder ever read or written?"""

import json
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora.errors import QloraError
from qlora.model.safetensors_reader import SafetensorsReader
from qlora.runs.load_run import read_verified_adapter
from qlora.training.checkpoint import read
from qlora.utils.atomic_files import sha256_of
from support.child_processes import Child, Notify
from support.faults.malicious_files import Workspace

ENTRIES = ("index", "checkpoint manifest", "run manifest")
OUTSIDE = "outside"


@dataclass
class Result:
    """Counts of names, and of those that were followed."""

    names: int = 0
    outside: int = 0  # files outside the folder that were opened or written
    believed: int = 0  # names that were accepted as files of the folder
    failed: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.outside or self.believed or self.failed)


def hostile_names(count: int, seed: int, target: Path) -> list[str]:
    """Parents, absolute paths, drives, streams, NUL, look-alikes, and mixtures; all point to `target` or worse."""
    rng, name = random.Random(seed), target.name
    ups = [f"{'../' * depth}{target.parent.name}/{name}" for depth in (1, 2, 3, 8)]
    fixed = [
        *ups, *(path.replace("/", "\\") for path in ups), str(target), f"file://{target}", f"//{target}", f"./{ups[0]}",
        f"C:\\{name}", f"C:{name}", f"\\\\host\\share\\{name}", f"{name}:stream", f"{name}\0.safetensors", f"\0{name}",
        "", ".", "..", "../", "/", "~/" + name, "/etc/passwd", "/proc/self/mem", "a/../" + ups[0], "....//" + name,
        "..%2f" + name, "\u2025/" + name, "\uff0e\uff0e/" + name, "../" * 200 + str(target), "x" * 5000 + "/" + name,
    ]  # fmt: skip
    parts = ("..", ".", "a", "", "\\", "/", str(target.parent), name, "\0", "%2e%2e", "C:", "~")
    mixed = ["/".join(rng.choice(parts) for _ in range(rng.randint(2, 6))) for _ in range(count)]
    return (fixed + mixed)[:count]


def open_all(workspace: Workspace, home: Path, count: int, seed: int, report: Callable[[Result], None]) -> Result:
    """Put each name into an index or manifest and open it, in a child that reports every file it opens."""
    result, target = Result(), home / OUTSIDE / "model.safetensors"
    target.parent.mkdir(exist_ok=True)
    shutil.copy(workspace.base / "model.safetensors", target)
    before = sha256_of(target)
    copy = workspace.copy_to(home)
    names = hostile_names(count, seed, target)

    def work(notify: Notify) -> None:
        recording = [False]

        def record(event: str, arguments: tuple[Any, ...]) -> None:
            if (
                recording[0]
                and event in ("open", "os.rename", "os.remove", "os.mkdir")
                and isinstance(arguments[0], str | bytes)
            ):
                path = Path(arguments[0] if isinstance(arguments[0], str) else arguments[0].decode(errors="replace"))
                if not path.resolve().is_relative_to((home / "workspace").resolve()):
                    notify(f"outside {str(path)[:200]!r}")

        sys.addaudithook(record)
        for number, name in enumerate(names):
            opening = _insert_name(copy, ENTRIES[number % len(ENTRIES)], name)
            recording[0] = True
            try:
                opening()
                notify(f"believed {name[:100]!r}")
            except QloraError:
                notify("refused")
            recording[0] = False

    child = Child(work, home / "log")
    code, lines = child.wait(), child.lines()
    result.names = sum(not line.startswith("outside") for line in lines)
    result.outside = sum(line.startswith("outside") for line in lines) + (sha256_of(target) != before)
    result.believed = sum(line.startswith("believed") for line in lines)
    result.failed = code or result.names != len(names)
    result.notes = [line for line in lines if line != "refused"][:20]
    if result.failed:
        result.notes.append((home / "log").read_text()[-500:])
    report(result)
    shutil.rmtree(home / "workspace")
    return result


def _insert_name(workspace: Workspace, entry: str, name: str) -> Callable[[], Any]:
    """Put `name` where a file of the workspace lists files; returns the function that reads that file."""
    if entry == "index":
        keys = dict.fromkeys(["model.norm.weight"], name)
        (workspace.base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": keys}))
        return lambda: SafetensorsReader(workspace.base)["model.norm.weight"]
    folder = max(workspace.run.glob("checkpoint-*")) if entry == "checkpoint manifest" else workspace.run
    path = folder / ("manifest.json" if entry == "checkpoint manifest" else "run.json")
    good = path.with_suffix(".good")
    if not good.exists():
        shutil.copy(path, good)
    manifest = json.loads(good.read_text())
    manifest["files"][name] = "0" * 64
    path.write_text(json.dumps(manifest) + "\n")
    return (
        (lambda: read(folder))
        if entry == "checkpoint manifest"
        else (lambda: read_verified_adapter(folder, lambda line: None))
    )
