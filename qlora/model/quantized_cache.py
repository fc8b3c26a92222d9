"""Disk cache of the quantized base: the second start reads 4-bit tensors instead of 16-bit ones.

An entry is a folder of safetensors parts, named after the base's fingerprint and its storage format. entry.json holds
the sha256 of each part, checked while it is read. A pointer file maps a model folder, by the names, sizes and times of
its files, to its entry. Entries are written to a temporary folder and renamed. A damaged entry is written again; one
that was not used for UNUSED_DAYS is deleted.
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

from qlora.distributed.broadcast import Payload, broadcast_in_turns
from qlora.errors import QloraError
from qlora.model.buffers import persistent_buffers
from qlora.model.dtypes import dtype_name
from qlora.model.layer_sharder import LayerSharder
from qlora.model.module_tree import set_tensors
from qlora.model.prefetch import prefetch
from qlora.model.weight_loader import LoadResult, LoadTarget, Report
from qlora.quant import Keeping, others_of
from qlora.quant.fourbit import FourBit
from qlora.quant.linear import FrozenLinear
from qlora.utils.atomic_files import PARTIAL, cache_folder, exclusive_lock, is_bare_name, sha256_of, write_json
from qlora.utils.atomic_folders import atomic_folder
from qlora.utils.machine import gib

FORMAT = 1
MIN_BASE_BYTES = 128 * 2**20  # smaller bases are not cached
PART_BYTES = 128 * 2**20  # of a part, unless one module is larger
UNUSED_DAYS = 30
ENTRY = "entry.json"
CACHE_NAMES = re.compile(rf"({re.escape(PARTIAL)})?[0-9a-f]{{64}}(\.lock|\.json)?")  # names that may be deleted


class DamagedEntry(Exception):
    """A cache entry that differs from what was written; the model may be partly loaded."""


class QuantizedCache:
    """The cached base of one model folder in one storage format; `usable`: whether there can be an entry."""

    def __init__(self, folder: Path, target: LoadTarget, sharder: LayerSharder | None = None) -> None:
        self.root, self.folder, self.target, self.sharder = cache_folder("base"), folder, target, sharder
        self.usable = self.root is not None and isinstance(others_of(target.quantizer), FourBit)

    def load(self, model: nn.Module, report: Report) -> LoadResult | None:
        """Load a model on `meta` from its entry; None if there is none. DamagedEntry if it does not verify."""
        path = self._entry_path()
        if not self._all_ranks_have(path is not None) or path is None:
            return None
        try:
            entry = _unsealed(path / ENTRY)
            digests: dict[str, str] = entry["files"]
            sizes = {name: (path / name).stat().st_size for name in digests}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedEntry(f"{path / ENTRY}: {error!r}") from error
        done, remaining = 0, set(persistent_buffers(model))
        for name, tensors in self._read(path, digests, sizes):
            remaining -= tensors.keys()
            set_tensors(model, tensors, entry["quantized"], self.target.device, self.target.device_of)
            if self.sharder:
                self.sharder.shard_complete(tensors)
            done += sizes[name]
            report(done, sum(sizes.values()))
        model.tie_weights()  # type: ignore[operator]
        if remaining or any(parameter.is_meta for parameter in model.parameters()):
            raise DamagedEntry(f"{path}: a tensor is missing")
        with suppress(OSError):
            os.utime(path / ENTRY)
        return LoadResult(entry["sha256"], tuple(entry["ignored"]), decoded=entry.get("decoded", {}))

    def _read(
        self, path: Path, digests: Mapping[str, str], sizes: Mapping[str, int]
    ) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """Name and verified tensors of each part; of several ranks, one reads a part and broadcasts it."""
        if self.sharder is None:
            yield from prefetch(list(digests), sizes.__getitem__, lambda name: _verified(path / name, digests[name]))
            return

        def read(name: str) -> Payload:
            return Payload(_verified(path / name, digests[name]))

        for name, payload in broadcast_in_turns(self.sharder.processes, list(digests), read, DamagedEntry):
            yield name, payload.tensors

    def _all_ranks_have(self, entry: bool) -> bool:
        """Whether all ranks that load together have an entry."""
        return entry if self.sharder is None else not self.sharder.processes.any(not entry)

    def save(self, model: nn.Module, result: LoadResult) -> str | None:
        """Write the entry of a loaded model; returns a note for the log. None if this base is not cached."""
        if not self.usable or self.root is None or result.prequantized:
            return None
        if self.sharder and self.sharder.processes.shards:  # no rank has all tensors
            return None
        size = sum(parameter.nbytes for parameter in model.parameters())
        if size < MIN_BASE_BYTES:
            return None
        path = self.root / _digest([FORMAT, result.sha256, self._storage()])
        try:
            with exclusive_lock(self.root, path.name):  # against processes that load the same base
                self._delete_unused(path.name)
                if not (path / ENTRY).is_file():
                    if shutil.disk_usage(self.root).free < 2 * size:
                        return f"the quantized base is not cached: {self.root} has no {gib(2 * size)} free"
                    self._write(path, model, result)
                write_json(self._pointer_path(), {"entry": path.name})
        except (OSError, QloraError) as error:
            return f"the quantized base is not cached: {error}"
        return f"the quantized base is cached in {path}: the next start reads {gib(size)}"

    def remove(self) -> None:
        """Remove an entry that does not verify."""
        path = self._entry_path()
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)

    def _entry_path(self) -> Path | None:
        """The folder of the entry that the pointer file of this model folder names, if it exists."""
        if not self.usable or self.root is None:
            return None
        try:
            name = json.loads(self._pointer_path().read_text(encoding="utf-8"))["entry"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return self.root / name if is_bare_name(name) and (self.root / name).is_dir() else None

    def _pointer_path(self) -> Path:
        """The pointer file of this model folder; another one as soon as one of its files changes."""
        files = sorted(path for path in self.folder.iterdir() if path.suffix in (".safetensors", ".json"))
        stats = [(path.name, path.stat()) for path in files]
        stamps = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats]
        assert self.root is not None
        name = _digest([FORMAT, str(self.folder.resolve()), stamps, self._storage()])
        return self.root / "folders" / f"{name}.json"

    def _storage(self) -> list[Any]:
        """The storage format. The device counts: a GPU rounds double quantization differently next to midpoints."""
        quantizer: Any = others_of(self.target.quantizer)
        kept = [list(self.target.quantizer.patterns)] if isinstance(self.target.quantizer, Keeping) else []
        return [quantizer.kind, asdict(quantizer), dtype_name(self.target.dtype), self.target.device.type, *kept]

    def _write(self, path: Path, model: nn.Module, result: LoadResult) -> None:
        with atomic_folder(path) as temporary:
            for number, part in enumerate(_parts(model), start=1):
                save_file(part, temporary / f"part-{number:05d}.safetensors")
            files = {file.name: sha256_of(file) for file in sorted(temporary.iterdir())}
            layers = {
                name: layer.describe() for name, layer in model.named_modules() if isinstance(layer, FrozenLinear)
            }
            body = {"sha256": result.sha256, "ignored": list(result.ignored), "quantized": layers, "files": files}
            body |= {"decoded": dict(result.decoded)} if result.decoded else {}
            write_json(temporary / ENTRY, {"seal": _digest(body), **body})

    def _delete_unused(self, current: str) -> None:
        """Delete partly written entries, and those that were not used for UNUSED_DAYS."""
        assert self.root is not None
        oldest = time.time() - UNUSED_DAYS * 86400
        for path in [*self.root.iterdir(), *(self.root / "folders").glob("*.json")]:
            used = path / ENTRY if (path / ENTRY).is_file() else path
            if CACHE_NAMES.fullmatch(path.name) and path.name != current and used.stat().st_mtime < oldest:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _parts(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The model's tensors on the CPU in its order, in parts; the tensors of a frozen layer share a part."""
    frozen = {path for path, layer in model.named_modules() if isinstance(layer, FrozenLinear)}
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in {**dict(model.named_parameters()), **persistent_buffers(model)}.items():
        path = name.rpartition(".")[0]
        groups.setdefault(path if path in frozen else name, {})[name] = tensor.detach()
    part: dict[str, Tensor] = {}
    for group in groups.values():
        if part and sum(tensor.nbytes for tensor in (*part.values(), *group.values())) > PART_BYTES:
            yield part
            part = {}
        part |= {name: value.cpu().contiguous() for name, value in group.items()}
    if part:
        yield part


def _verified(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a part, copied out of the mapped file."""
    try:
        if sha256_of(path) != sha256:
            raise DamagedEntry(f"{path}: its sha256 differs from {ENTRY}")
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DamagedEntry(f"{path}: {error}") from error


def _unsealed(path: Path) -> dict[str, Any]:
    """An entry's JSON. ValueError if it differs from its seal, the digest of what was written."""
    entry: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    seal = entry.pop("seal")
    if _digest(entry) != seal:
        raise ValueError("its seal does not match")
    return entry


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
