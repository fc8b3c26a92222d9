"""Random mutations of adapter folders, checkpoints and configurations: is there a crash, a hang or a stack trace?"""

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
from qlora.adapters.attach import attach
from qlora.errors import BaseModelError, QloraError
from qlora.model import Model
from qlora.model.load_base import Base, load
from qlora.model.meta_model import build_meta_model, read_config
from qlora.quant import Quant, build_quantizer
from qlora.recipe.planning import Machine, Planner, require_fit
from qlora.training.checkpoint import read, restore_adapter
from qlora.utils.atomic_files import sha256_manifest
from support.child_processes import Child, Notify
from support.faults.malicious_files import Workspace
from support.small_runs import recipe_of

HANG_SECONDS = 10
MEMORY_BYTES = 2**30  # more than the process holds already
BATCH = 250
ENTRIES = ("adapter config", "adapter weights", "base config", "position", "adapter config", "optimizer")
DEEP: Any = "deep"
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, -0.0, float("nan"), float("inf"), "", "x", "x" * 100_000,
    "../../x", "/etc/passwd", "(a+)+$", "(" * 400,
    "a{99999999999}", "\0", "\ud800", [], {}, [[]], [None] * 1000, {"": {}}, DEEP,
    "0", 1e-320, "nan", "auto", "eager", ["q_proj"] * 10_000, {"q_proj": -1}, {"(a+)+$": 2}, 0.5, 7, 3, 10**6, 10**9,
)  # fmt: skip


@dataclass
class Result:
    """Counts of mutants, and of how reading them ended."""

    mutants: int = 0
    refused: int = 0
    accepted: int = 0
    traces: int = 0  # any other exception: the user would see a stack trace
    crashes: int = 0  # the process was killed
    hangs: int = 0
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def clean(self) -> bool:
        return not (self.traces or self.crashes or self.hangs)


class Hang(BaseException):
    """Raised when reading takes too long; a BaseException, so that no library catches it."""


def mutated_json(text: str, rng: random.Random) -> bytes:
    """A JSON text with a value replaced, a key removed, copied or renamed, or with mutated bytes."""
    if rng.random() < 0.25:
        return mutated_bytes(text.encode(), rng)
    value = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        container, key = _random_item(value, rng)
        if container is None:
            continue
        kind = rng.random()
        if kind < 0.7:
            container[key] = deepcopy(rng.choice(HOSTILE))
        elif kind < 0.85:
            del container[key]
        elif isinstance(container, dict):
            container[rng.choice(list(container)) + rng.choice(("", "x", "_"))] = deepcopy(rng.choice(HOSTILE))
    mutated = json.dumps(value)
    return mutated.replace('"deep"', "[" * 50_000 + "]" * 50_000).encode("utf-8", "surrogatepass") + b"\n"


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bit flips, truncations, insertions and moved ranges; mostly near the start, where headers are."""
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        end = min(len(damaged), 600) if rng.random() < 0.7 else len(damaged)
        start = rng.randrange(max(1, end))
        kind = rng.random()
        if kind < 0.5 and damaged:
            damaged[start % len(damaged)] ^= 1 << rng.randrange(8)
        elif kind < 0.65:
            del damaged[start:]
        elif kind < 0.8:
            damaged[start:start] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 16)))
        else:
            size = rng.randint(1, 64)
            damaged[start : start + size] = damaged[rng.randrange(max(1, len(damaged))) :][:size]
    return bytes(damaged)


def _random_item(value: Any, rng: random.Random) -> tuple[Any, Any]:
    """The container and key of a random item in nested lists and dicts."""
    container, key = None, None
    while isinstance(value, dict | list) and value and (container is None or rng.random() < 0.6):
        container, key = value, rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value = container[key]
    return container, key


class Targets:
    """The files that are mutated, by the names of ENTRIES, and how each is read."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.checkpoint = max(workspace.run.glob("checkpoint-*"))
        self.base: Base = load(
            Model(name=str(workspace.base), dtype="float32"), build_quantizer(Quant()), torch.device("cpu")
        )
        self.files = {
            "adapter config": workspace.run / peft_files.CONFIG,
            "adapter weights": workspace.run / peft_files.WEIGHTS,
            "base config": workspace.base / "config.json",
            "position": self.checkpoint / "position.json",
            "optimizer": self.checkpoint / "optimizer.safetensors",
        }
        self.contents = {entry: path.read_bytes() for entry, path in self.files.items()}

    def mutate(self, entry: str, rng: random.Random) -> None:
        path, content = self.files[entry], self.contents[entry]
        path.write_bytes(mutated_json(content.decode(), rng) if path.suffix == ".json" else mutated_bytes(content, rng))
        if path.parent == self.checkpoint:  # an attacker would write a manifest that fits
            manifest = json.loads((self.checkpoint / "manifest.json").read_text())
            manifest["files"] = sha256_manifest(self.checkpoint, exclude=("manifest.json",))
            (self.checkpoint / "manifest.json").write_text(json.dumps(manifest) + "\n")

    def open(self, entry: str) -> None:
        if entry.startswith("adapter"):
            attach(self.base.model, peft_files.read(self.workspace.run), self.base.manifest.sha256)
        elif entry == "base config":
            with suppress(BaseModelError):  # as in a run, which continues without a plan if the shapes are not known
                recipe = recipe_of(self.workspace.base, self.workspace.rows, self.workspace.run)
                require_fit(Planner(recipe).plan(Machine.local()))
            config = read_config(self.workspace.base)
            build_meta_model(config, torch.float32, "auto", torch.device("cpu"))
        else:
            read(self.checkpoint)
            peft_files.read_tensors(self.files["optimizer"])
            restore_adapter(self.checkpoint, self.base.model)

    def restore(self, entry: str) -> None:
        self.files[entry].write_bytes(self.contents[entry])


def mutate_all(workspace: Workspace, home: Path, count: int, seed: int, report: Callable[[Result], None]) -> Result:
    """`count` mutants, BATCH of them read in one child process; half of them are adapters."""
    result, targets = Result(), Targets(workspace.copy_to(home))
    for first in range(0, count, BATCH):
        numbers = range(first, min(first + BATCH, count))

        def work(notify: Notify, numbers: range = numbers) -> None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            signal.signal(signal.SIGALRM, _raise_hang)
            for number in numbers:
                notify(_outcome(targets, ENTRIES[number % len(ENTRIES)], random.Random(f"{seed} {number}"), number))

        child = Child(work, home / "log")
        code, lines = child.wait(), child.lines()
        for line in lines:
            outcome, _, details = line.partition(" ")
            setattr(result, outcome, getattr(result, outcome) + 1)
            if details:
                result.notes[details] += 1
        result.mutants += len(numbers)
        if code or len(lines) != len(numbers):
            result.crashes += 1
            result.notes[f"exit code {code} at {numbers[0] + len(lines)}: {(home / 'log').read_text()[-300:]}"] += 1
        report(result)
    shutil.rmtree(home / "workspace", ignore_errors=True)
    return result


def _outcome(targets: Targets, entry: str, rng: random.Random, number: int) -> str:
    """How reading one mutant ended: a field of Result, and details if something is wrong."""
    targets.mutate(entry, rng)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    started = time.process_time()
    try:
        targets.open(entry)
        return "accepted"
    except QloraError as error:
        if _is_out_of_memory(error):
            return f"traces {entry} {number}: more than {MEMORY_BYTES} bytes"
        return "refused" if "\n" not in str(error) else f"traces {entry} {number}: a message of several lines"
    except Hang:
        return f"hangs {entry} {number}: {time.process_time() - started:.0f} s"
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        location = f"{Path(frame.filename).name}:{frame.lineno}"
        message = f"{type(error).__name__} {str(error)[:60]!r}".replace("\n", " ")
        return f"traces {entry} {number}: {message} at {location}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        targets.restore(entry)


def _raise_hang(number: int, frame: FrameType | None) -> None:
    raise Hang


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the memory limit, not a check, caused the error."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
