"""Adapter folders, checkpoints and configurations spoilt at random: is there a crash, a hang, or a stack trace?"""

import json
import os
import random
import resource
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from qlora.adapters import peft_files
from qlora.errors import BaseModelError, QloraError
from qlora.model import Model
from qlora.model.load_base import Base, load
from qlora.model.meta_model import build, read_config
from qlora.quant.nf4 import Nf4
from qlora.recipe.planning import plan_run
from qlora.training.checkpoint import read, restore_adapter
from qlora.utils.atomic_files import manifest_of
from support.child_processes import Child, Tell
from support.faults.malicious_files import Scene
from support.small_runs import recipe_of

HANG_SECONDS = 10
MEMORY_BYTES = 2**30  # beyond what the process holds
BATCH = 250
DEEP: Any = "deep"
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, -0.0, float("nan"), float("inf"), "", "x", "x" * 100_000,
    "../../x", "/etc/passwd", "(a+)+$", "(" * 400,
    "a{99999999999}", "\0", "\ud800", [], {}, [[]], [None] * 1000, {"": {}}, DEEP,
    "0", 1e-320, "nan", "auto", "eager", ["q_proj"] * 10_000, {"q_proj": -1}, {"(a+)+$": 2}, 0.5, 7, 3, 10**6, 10**9,
)  # fmt: skip


@dataclass
class Found:
    """What became of the mutants."""

    mutants: int = 0
    refused: int = 0
    accepted: int = 0
    traces: int = 0  # any other exception: the user would see a stack trace, or be told that the program is at fault
    crashes: int = 0  # the process died
    hangs: int = 0
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def clean(self) -> bool:
        return not (self.traces or self.crashes or self.hangs)


class Hang(BaseException):
    """It took too long; no library catches it."""


def mutated_json(text: str, draw: random.Random) -> bytes:
    """A JSON text with a value replaced, a key lost, doubled or renamed, or with its bytes spoilt."""
    if draw.random() < 0.25:
        return mutated_bytes(text.encode(), draw)
    value = json.loads(text)
    for _ in range(draw.randint(1, 3)):
        holder, key = _somewhere(value, draw)
        if holder is None:
            continue
        deed = draw.random()
        if deed < 0.7:
            holder[key] = deepcopy(draw.choice(HOSTILE))
        elif deed < 0.85:
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw.choice(list(holder)) + draw.choice(("", "x", "_"))] = deepcopy(draw.choice(HOSTILE))
    written = json.dumps(value)
    return written.replace('"deep"', "[" * 50_000 + "]" * 50_000).encode("utf-8", "surrogatepass") + b"\n"


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    """Flips, cuts, insertions, and stretches put elsewhere; mostly near the start, where headers are."""
    damaged = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        end = min(len(damaged), 600) if draw.random() < 0.7 else len(damaged)
        at = draw.randrange(max(1, end))
        deed = draw.random()
        if deed < 0.5 and damaged:
            damaged[at % len(damaged)] ^= 1 << draw.randrange(8)
        elif deed < 0.65:
            del damaged[at:]
        elif deed < 0.8:
            damaged[at:at] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 16)))
        else:
            size = draw.randint(1, 64)
            damaged[at : at + size] = damaged[draw.randrange(max(1, len(damaged))) :][:size]
    return bytes(damaged)


def _somewhere(value: Any, draw: random.Random) -> tuple[Any, Any]:
    """A random place in nested lists and dicts, as what holds it and its key."""
    holder, key = None, None
    while isinstance(value, dict | list) and value and (holder is None or draw.random() < 0.6):
        holder, key = value, draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        value = holder[key]
    return holder, key


class Victims:
    """What is spoilt, and how it is opened: by the names of the entries."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.checkpoint = max(scene.run.glob("checkpoint-*"))
        self.base: Base = load(Model(name=str(scene.base), dtype="float32"), Nf4(), torch.device("cpu"))
        self.files = {
            "adapter config": scene.run / peft_files.CONFIG,
            "adapter weights": scene.run / peft_files.WEIGHTS,
            "base config": scene.base / "config.json",
            "position": self.checkpoint / "position.json",
            "optimizer": self.checkpoint / "optimizer.safetensors",
        }
        self.whole = {entry: path.read_bytes() for entry, path in self.files.items()}

    def spoil(self, entry: str, draw: random.Random) -> None:
        path, content = self.files[entry], self.whole[entry]
        path.write_bytes(
            mutated_json(content.decode(), draw) if path.suffix == ".json" else mutated_bytes(content, draw)
        )
        if path.parent == self.checkpoint:  # an attacker's manifest vouches for it
            manifest = json.loads((self.checkpoint / "manifest.json").read_text())
            manifest["files"] = manifest_of(self.checkpoint, but=("manifest.json",))
            (self.checkpoint / "manifest.json").write_text(json.dumps(manifest) + "\n")

    def open(self, entry: str) -> None:
        if entry.startswith("adapter"):
            peft_files.attach(self.base.model, peft_files.read(self.scene.run), self.base.manifest.sha256)
        elif entry == "base config":
            with suppress(BaseModelError):  # as a run does: without shapes it goes on without a plan
                plan_run(recipe_of(self.scene.base, self.scene.rows, self.scene.run), 1)
            config = read_config(self.scene.base)
            build(config, torch.float32, "auto", torch.device("cpu"))
        else:
            read(self.checkpoint)
            peft_files.read_named(self.files["optimizer"])
            restore_adapter(self.checkpoint, self.base.model)

    def mend(self, entry: str) -> None:
        self.files[entry].write_bytes(self.whole[entry])


def mutate_all(scene: Scene, home: Path, count: int, seed: int, report: Callable[[Found], None]) -> Found:
    """`count` mutants, opened in children that die alone; two in three are adapters."""
    found, victims = Found(), Victims(scene.fresh(home))
    entries = ("adapter config", "adapter weights", "base config", "position", "adapter config", "optimizer")
    for first in range(0, count, BATCH):
        numbers = range(first, min(first + BATCH, count))

        def work(tell: Tell, numbers: range = numbers) -> None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            ceiling = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (ceiling, ceiling))
            signal.signal(signal.SIGALRM, _hang)
            for number in numbers:
                tell(_opened(victims, entries[number % len(entries)], random.Random(f"{seed} {number}"), number))

        child = Child(work, home / "said")
        code, lines = child.end(), child.lines()
        for line in lines:
            outcome, _, what = line.partition(" ")
            setattr(found, outcome, getattr(found, outcome) + 1)
            if what:
                found.notes[what] += 1
        found.mutants += len(numbers)
        if code or len(lines) != len(numbers):
            found.crashes += 1
            found.notes[f"died with {code} at {numbers[0] + len(lines)}: {(home / 'said').read_text()[-300:]}"] += 1
        report(found)
    shutil.rmtree(home / "scene", ignore_errors=True)
    return found


def _opened(victims: Victims, entry: str, draw: random.Random, number: int) -> str:
    """What came of one mutant, in a word, with where it went wrong."""
    victims.spoil(entry, draw)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    started = time.process_time()
    try:
        victims.open(entry)
        return "accepted"
    except QloraError as error:
        if _filled_memory(error):
            return f"traces {entry} {number}: more than {MEMORY_BYTES} bytes"
        return "refused" if "\n" not in str(error) else f"traces {entry} {number}: a message of several lines"
    except Hang:
        return f"hangs {entry} {number}: {time.process_time() - started:.0f} s"
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        what = f"{type(error).__name__} {str(error)[:60]!r}".replace("\n", " ")
        return f"traces {entry} {number}: {what} at {where}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        victims.mend(entry)


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang


def _filled_memory(error: BaseException | None) -> bool:
    """Whether the limit on memory, rather than a check, was what ended it."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
