"""Flipped bits and cuts in every file of a checkpoint and of a finished run: is one ever read as if it were whole?"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from qlora.adapters import peft_files
from qlora.errors import QloraError
from qlora.runs.artifacts import MANIFEST as RUN_MANIFEST
from qlora.runs.load_run import intact
from qlora.training.checkpoint import Saved, read


@dataclass
class Found:
    """What became of the damage."""

    flips: int = 0
    cuts: int = 0
    undetected: int = 0  # read without a word, and not the same as before
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.undetected


def damage(folder: Path, flips: int, cuts: int, seed: int, report: Callable[[Found], None]) -> Found:
    """Damage a file of a checkpoint or a run's folder, open it as resuming or serving does, mend it again."""
    draw, found = random.Random(seed), Found()
    files = sorted(path for path in folder.iterdir() if path.is_file() and _is_read(folder, path))
    whole = _opened(folder)
    for number in range(flips + cuts):
        path = files[number % len(files)]
        content = path.read_bytes()
        path.write_bytes(_flipped(content, draw) if number < flips else content[: draw.randrange(len(content))])
        try:
            again = _opened(folder)
            if not _same(whole, again):
                found.undetected += 1
                found.notes.append(path.name)
        except QloraError:
            pass
        finally:
            path.write_bytes(content)
        found.flips += number < flips
        found.cuts += number >= flips
        report(found)
    return found


def _is_read(folder: Path, path: Path) -> bool:
    """All of a checkpoint; of a finished run what its manifest vouches for, and the manifest."""
    return (folder / "position.json").is_file() or path.name in (RUN_MANIFEST, peft_files.WEIGHTS, peft_files.CONFIG)


def _flipped(content: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(content)
    damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def _opened(folder: Path) -> tuple[Saved | None, peft_files.AdapterFile]:
    said: list[str] = []
    adapter = intact(folder, said.append)
    # Cloned: what safetensors gives is a map of the file, which is about to be spoilt.
    adapter = replace(adapter, pairs={path: (a.clone(), b.clone()) for path, (a, b) in adapter.pairs.items()})
    if said:
        raise QloraError(said[0])
    return read(folder) if (folder / "position.json").is_file() else None, adapter


def _same(one: tuple[Saved | None, peft_files.AdapterFile], other: tuple[Saved | None, peft_files.AdapterFile]) -> bool:
    """Whether what was read is the same: then the damage was to something that nobody reads."""
    (saved, adapter), (saved_again, adapter_again) = one, other
    pairs = adapter.pairs.keys() == adapter_again.pairs.keys() and all(
        mine.equal(theirs)
        for path in adapter.pairs
        for mine, theirs in zip(adapter.pairs[path], adapter_again.pairs[path], strict=True)
    )
    return saved == saved_again and pairs and adapter.config == adapter_again.config
