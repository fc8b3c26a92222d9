"""The quantised base kept between runs, so that the second start reads 4 bits instead of 16.  Door: safetensors.

An entry is a folder of safetensors parts named after the base's fingerprint and how it is stored; entry.json holds the
parts' sha256, checked while they are read. Which entry a model folder has is remembered by its files' names, sizes and
times. Entries are written aside and renamed; one that is damaged is made anew, one unused for a month goes.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora.distributed.broadcast import Payload, deal
from qlora.errors import QloraError
from qlora.model.dtypes import name_of
from qlora.model.module_tree import LayerSharder, put_all
from qlora.model.prefetch import ahead
from qlora.model.weight_loader import LoadResult, LoadTarget, Report
from qlora.quant.fourbit import FourBit
from qlora.quant.linear import FrozenLinear
from qlora.utils.atomic_files import ASIDE, alone, cache_home, plain_name, sha256_of, write_json
from qlora.utils.atomic_folders import folder_in_one_step

FORMAT = 1
SMALLEST_BYTES = 128 * 2**20  # of a base that is worth keeping
PART_BYTES = 128 * 2**20  # of a part, unless one module is larger
UNUSED_DAYS = 30
ENTRY = "entry.json"
OURS = re.compile(rf"({re.escape(ASIDE)})?[0-9a-f]{{64}}(\.lock|\.json)?")  # names that may be swept


class Damaged(Exception):
    """An entry that is not what was written; the model may be filled in part."""


class QuantizedCache:
    """The kept base of one model folder under one way to store it; `usable` says whether there can be one."""

    def __init__(self, folder: Path, aim: LoadTarget, sharing: LayerSharder | None = None) -> None:
        self.home, self.folder, self.aim, self.sharing = cache_home("base"), folder, aim, sharing
        self.usable = self.home is not None and isinstance(aim.quantizer, FourBit)

    def recall(self, model: nn.Module, report: Report) -> LoadResult | None:
        """Fill a model on meta from its entry; None if there is none. Damaged if there is one that does not verify."""
        place = self._place()
        if not self._agreed(place is not None) or place is None:
            return None
        try:
            entry = _unsealed(place / ENTRY)
            parts: dict[str, str] = entry["files"]
            sizes = {name: (place / name).stat().st_size for name in parts}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Damaged(f"{place / ENTRY}: {error!r}") from error
        done = 0
        for name, tensors in self._read(place, parts, sizes):
            put_all(model, tensors, entry["quantized"], self.aim.home)
            if self.sharing:
                self.sharing.finish(tensors)
            done += sizes[name]
            report(done, sum(sizes.values()))
        model.tie_weights()  # type: ignore[operator]
        if any(parameter.is_meta for parameter in model.parameters()):
            raise Damaged(f"{place}: lacks a tensor")
        with suppress(OSError):
            os.utime(place / ENTRY)
        return LoadResult(entry["sha256"], tuple(entry["ignored"]))

    def _read(
        self, place: Path, parts: Mapping[str, str], sizes: Mapping[str, int]
    ) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """Each part with its tensors, verified; where several processes read, by one of them for all."""
        if self.sharing is None:
            yield from ahead(list(parts), sizes.__getitem__, lambda name: _verified(place / name, parts[name]))
            return

        def read(name: str) -> Payload:
            return Payload(_verified(place / name, parts[name]))

        for name, parcel in deal(self.sharing.processes, list(parts), read, Damaged):
            yield name, parcel.tensors

    def _agreed(self, there: bool) -> bool:
        """Whether all processes that share the reading find it there."""
        return there if self.sharing is None else not self.sharing.processes.any(not there)

    def keep(self, model: nn.Module, known: LoadResult) -> str | None:
        """Write the entry of a filled model; returns a line about it. None if there is nothing to say or to keep."""
        if not self.usable or self.home is None or known.prequantized:
            return None
        if self.sharing and self.sharing.processes.shards:  # no process has the whole of it
            return None
        size = sum(parameter.nbytes for parameter in model.parameters())
        if size < SMALLEST_BYTES:
            return None
        place = self.home / _digest([FORMAT, known.sha256, self._stored_as()])
        try:
            with alone(self.home, place.name):  # processes that load the same base
                self._sweep(place.name)
                if not (place / ENTRY).is_file():
                    if shutil.disk_usage(self.home).free < 2 * size:
                        return f"the quantised base is not kept: {self.home} has no {2 * size / 2**30:.1f} GiB free"
                    self._write(place, model, known)
                write_json(self._memo(), {"entry": place.name})
        except (OSError, QloraError) as error:
            return f"the quantised base is not kept: {error}"
        return f"the quantised base is kept in {place}: the next start reads {size / 2**30:.1f} GiB"

    def forget(self) -> None:
        """Remove an entry that does not verify."""
        place = self._place()
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)

    def _place(self) -> Path | None:
        """The folder of the entry, if this model folder is known to have one."""
        if not self.usable or self.home is None:
            return None
        try:
            name = json.loads(self._memo().read_text(encoding="utf-8"))["entry"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return self.home / name if plain_name(name) and (self.home / name).is_dir() else None

    def _memo(self) -> Path:
        """Where it is remembered which entry this model folder has, as long as its files stay as they are."""
        files = sorted(path for path in self.folder.iterdir() if path.suffix in (".safetensors", ".json"))
        stamps = [(path.name, (found := path.stat()).st_size, found.st_mtime_ns, found.st_ino) for path in files]
        assert self.home is not None
        return (
            self.home / "folders" / f"{_digest([FORMAT, str(self.folder.resolve()), stamps, self._stored_as()])}.json"
        )

    def _stored_as(self) -> list[Any]:
        """How the matrices are stored; a card rounds double quantisation otherwise than a CPU, next to midpoints."""
        quantizer: Any = self.aim.quantizer
        return [quantizer.kind, asdict(quantizer), name_of(self.aim.dtype), self.aim.device.type]

    def _write(self, place: Path, model: nn.Module, known: LoadResult) -> None:
        with folder_in_one_step(place) as aside:
            for number, part in enumerate(_parts(model), start=1):
                save_file(part, aside / f"part-{number:05d}.safetensors")
            files = {path.name: sha256_of(path) for path in sorted(aside.iterdir())}
            layers = {
                path: layer.describe() for path, layer in model.named_modules() if isinstance(layer, FrozenLinear)
            }
            body = {"sha256": known.sha256, "ignored": list(known.ignored), "quantized": layers, "files": files}
            write_json(aside / ENTRY, {"seal": _digest(body), **body})

    def _sweep(self, mine: str) -> None:
        """Remove entries that were left half-written, or are unused for long."""
        assert self.home is not None
        oldest = time.time() - UNUSED_DAYS * 86400
        for path in [*self.home.iterdir(), *(self.home / "folders").glob("*.json")]:
            used = path / ENTRY if (path / ENTRY).is_file() else path
            if OURS.fullmatch(path.name) and path.name != mine and used.stat().st_mtime < oldest:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _parts(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The model's tensors on the CPU, in its order, a frozen layer's together."""
    frozen = {path: layer for path, layer in model.named_modules() if isinstance(layer, FrozenLinear)}
    groups: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        path = name.rpartition(".")[0]
        groups.setdefault(path if path in frozen else name, {})[name] = parameter.detach()
    part: dict[str, Tensor] = {}
    for group in groups.values():
        if part and sum(each.nbytes for each in (*part.values(), *group.values())) > PART_BYTES:
            yield part
            part = {}
        part |= {name: value.cpu().contiguous() for name, value in group.items()}
    if part:
        yield part


def _verified(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a part, in memory of their own."""
    try:
        if sha256_of(path) != sha256:
            raise Damaged(f"{path}: its sha256 is not the one written down")
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise Damaged(f"{path}: {error}") from error


def _unsealed(path: Path) -> dict[str, Any]:
    """An entry's JSON. ValueError if it is not what was sealed."""
    entry: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    seal = entry.pop("seal")
    if _digest(entry) != seal:
        raise ValueError("its seal is broken")
    return entry


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
