"""Flipped bits and truncations in every file of a checkpoint and of a finished run: does one ever go unnoticed?"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from qlora.adapters import peft_files
from qlora.errors import QloraError
from qlora.runs.artifacts import MANIFEST as RUN_MANIFEST
from qlora.runs.load_run import read_verified_adapter
from qlora.training.checkpoint import Checkpoint, read


@dataclass
class Result:
    """Counts of damaged files, and of those that were read without an error."""

    flips: int = 0
    cuts: int = 0
    undetected: int = 0  # read without an error or a warning, with different contents
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.undetected


def damage_files(folder: Path, flips: int, cuts: int, seed: int, report: Callable[[Result], None]) -> Result:
    """Damage a file of a checkpoint or a run folder, read the folder as resuming or loading does, restore the file."""
    rng, result = random.Random(seed), Result()
    files = sorted(path for path in folder.iterdir() if path.is_file() and _is_read(folder, path))
    intact = _read(folder)
    for number in range(flips + cuts):
        path = files[number % len(files)]
        content = path.read_bytes()
        path.write_bytes(_flip_bit(content, rng) if number < flips else content[: rng.randrange(len(content))])
        try:
            if not _same(intact, _read(folder)):
                result.undetected += 1
                result.notes.append(path.name)
        except QloraError:
            pass
        finally:
            path.write_bytes(content)
        result.flips += number < flips
        result.cuts += number >= flips
        report(result)
    return result


def _is_read(folder: Path, path: Path) -> bool:
    """All files of a checkpoint; of a finished run the manifest and the files whose digests it holds."""
    return (folder / "position.json").is_file() or path.name in (RUN_MANIFEST, peft_files.WEIGHTS, peft_files.CONFIG)


def _flip_bit(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _read(folder: Path) -> tuple[Checkpoint | None, peft_files.AdapterFile]:
    warnings: list[str] = []
    adapter = read_verified_adapter(folder, warnings.append)
    # Cloned: safetensors maps the file, which is about to be damaged.
    adapter = replace(adapter, pairs={path: (a.clone(), b.clone()) for path, (a, b) in adapter.pairs.items()})
    if warnings:
        raise QloraError(warnings[0])
    return read(folder) if (folder / "position.json").is_file() else None, adapter


def _same(
    one: tuple[Checkpoint | None, peft_files.AdapterFile], other: tuple[Checkpoint | None, peft_files.AdapterFile]
) -> bool:
    """Whether the contents are the same: then the damaged bytes are not used."""
    (saved, adapter), (saved_again, adapter_again) = one, other
    pairs = adapter.pairs.keys() == adapter_again.pairs.keys() and all(
        a.equal(b)
        for path in adapter.pairs
        for a, b in zip(adapter.pairs[path], adapter_again.pairs[path], strict=True)
    )
    return saved == saved_again and pairs and adapter.config == adapter_again.config
