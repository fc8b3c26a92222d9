"""Synchronize the checkpoint to resume from: rank 0 decides, machines that do not share its disk receive the files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from qlora.distributed.broadcast import Payload, broadcast
from qlora.distributed.processes import Processes
from qlora.training.checkpoint import Checkpoint, read
from qlora.utils.atomic_files import write_bytes


@contextmanager
def sync_checkpoint(processes: Processes, local: Checkpoint | None) -> Iterator[Checkpoint | None]:
    """The checkpoint that rank 0 found, on every rank. `local`: the one on this rank's own disk.

    A checkpoint that was received is in a temporary folder, which exists inside the block, and is verified as usual.
    """
    local_sha256 = local.manifest_sha256 if local else None
    sha256 = local_sha256
    if processes.world_size > 1:
        sha256 = broadcast(processes, 0, Payload(metadata=sha256) if processes.is_main else None).metadata
    if not processes.any(sha256 != local_sha256) or sha256 is None:
        yield local if sha256 == local_sha256 else None  # a checkpoint on another machine's disk is of another run
        return
    payload = broadcast(processes, 0, _pack(local.folder) if processes.is_main and local else None)
    if processes.is_main:
        yield local
        return
    with TemporaryDirectory(prefix="qlora-") as folder:
        yield _unpack(payload, Path(folder))


def _pack(folder: Path) -> Payload:
    """The files of a checkpoint as uint8 tensors."""
    return Payload({file.name: _bytes_of(file) for file in sorted(folder.iterdir()) if file.is_file()}, folder.name)


def _unpack(payload: Payload, parent: Path) -> Checkpoint:
    folder = parent / str(payload.metadata)
    folder.mkdir()
    for name, content in payload.tensors.items():
        write_bytes(folder / name, content.cpu().numpy().tobytes())
    return read(folder)


def _bytes_of(file: Path) -> Tensor:
    content = bytearray(file.read_bytes())
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
