"""Names of files found inside files, made to lead elsewhere: is anything outside the folder read or written?"""

import json
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora.errors import QloraError
from qlora.model.safetensors_reader import Shards
from qlora.runs.load_run import intact
from qlora.training.checkpoint import read
from qlora.utils.atomic_files import sha256_of
from support.child_processes import Child, Tell
from support.faults.malicious_files import Scene

ENTRIES = ("index", "checkpoint manifest", "run manifest")
OUTSIDE = "outside"


@dataclass
class Found:
    """What became of the names."""

    names: int = 0
    outside: int = 0  # opened, or written, outside the folder
    believed: int = 0  # taken for a file of the folder
    failed: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.outside or self.believed or self.failed)


def hostile_names(count: int, seed: int, target: Path) -> list[str]:
    """Parents, absolute paths, drives, streams, NUL, look-alikes, and mixtures of them; all mean `target` or worse."""
    draw, name = random.Random(seed), target.name
    ups = [f"{'../' * depth}{target.parent.name}/{name}" for depth in (1, 2, 3, 8)]
    fixed = [
        *ups, *(each.replace("/", "\\") for each in ups), str(target), f"file://{target}", f"//{target}", f"./{ups[0]}",
        f"C:\\{name}", f"C:{name}", f"\\\\host\\share\\{name}", f"{name}:stream", f"{name}\0.safetensors", f"\0{name}",
        "", ".", "..", "../", "/", "~/" + name, "/etc/passwd", "/proc/self/mem", "a/../" + ups[0], "....//" + name,
        "..%2f" + name, "\u2025/" + name, "\uff0e\uff0e/" + name, "../" * 200 + str(target), "x" * 5000 + "/" + name,
    ]  # fmt: skip
    parts = ("..", ".", "a", "", "\\", "/", str(target.parent), name, "\0", "%2e%2e", "C:", "~")
    mixed = ["/".join(draw.choice(parts) for _ in range(draw.randint(2, 6))) for _ in range(count)]
    return (fixed + mixed)[:count]


def follow_all(scene: Scene, home: Path, count: int, seed: int, report: Callable[[Found], None]) -> Found:
    """Each name through each entry, in a child that reports every file it opens."""
    found, target = Found(), home / OUTSIDE / "model.safetensors"
    target.parent.mkdir(exist_ok=True)
    shutil.copy(scene.base / "model.safetensors", target)
    before = sha256_of(target)
    spoilt = scene.fresh(home)
    names = hostile_names(count, seed, target)

    def work(tell: Tell) -> None:
        watching = [False]

        def heard(event: str, arguments: tuple[Any, ...]) -> None:
            if (
                watching[0]
                and event in ("open", "os.rename", "os.remove", "os.mkdir")
                and isinstance(arguments[0], str | bytes)
            ):
                path = Path(arguments[0] if isinstance(arguments[0], str) else arguments[0].decode(errors="replace"))
                if not path.resolve().is_relative_to((home / "scene").resolve()):
                    tell(f"outside {str(path)[:200]!r}")

        sys.addaudithook(heard)
        for number, name in enumerate(names):
            opening = _spoil(spoilt, ENTRIES[number % len(ENTRIES)], name)
            watching[0] = True
            try:
                opening()
                tell(f"believed {name[:100]!r}")
            except QloraError:
                tell("refused")
            watching[0] = False

    child = Child(work, home / "said")
    code, lines = child.end(), child.lines()
    found.names = sum(not line.startswith("outside") for line in lines)
    found.outside = sum(line.startswith("outside") for line in lines) + (sha256_of(target) != before)
    found.believed = sum(line.startswith("believed") for line in lines)
    found.failed = code or found.names != len(names)
    found.notes = [line for line in lines if line != "refused"][:20]
    if found.failed:
        found.notes.append((home / "said").read_text()[-500:])
    report(found)
    shutil.rmtree(home / "scene")
    return found


def _spoil(scene: Scene, entry: str, name: str) -> Callable[[], Any]:
    """Put `name` where a file of the scene names files; returns what opens it."""
    if entry == "index":
        keys = dict.fromkeys(["model.norm.weight"], name)
        (scene.base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": keys}))
        return lambda: Shards(scene.base)["model.norm.weight"]
    folder = max(scene.run.glob("checkpoint-*")) if entry == "checkpoint manifest" else scene.run
    path = folder / ("manifest.json" if entry == "checkpoint manifest" else "run.json")
    good = path.with_suffix(".good")
    if not good.exists():
        shutil.copy(path, good)
    manifest = json.loads(good.read_text())
    manifest["files"][name] = "0" * 64
    path.write_text(json.dumps(manifest) + "\n")
    return (lambda: read(folder)) if entry == "checkpoint manifest" else (lambda: intact(folder, lambda line: None))
