"""Where a run goes on is the first process's word: machines that do not share its disk are sent the checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from qlora.distributed.broadcast import Payload, send
from qlora.distributed.processes import Processes
from qlora.training.checkpoint import Saved, read
from qlora.utils.atomic_files import write_bytes


@contextmanager
def agreed(processes: Processes, mine: Saved | None) -> Iterator[Saved | None]:
    """The checkpoint that the first process found, on every process; `mine` is what this one found on its own disk.

    One that was sent lies in a folder that is there inside the block, verified like any other.
    """
    wanted = mine.identity if mine else None
    if processes.world > 1:
        wanted = send(processes, 0, Payload(note=wanted) if processes.is_main else None).note
    same = wanted == (mine.identity if mine else None)
    if not processes.any(not same) or wanted is None:
        yield mine if same else None  # what lies on another machine's disk is not this run's
        return
    sent = send(processes, 0, _packed(mine.folder) if processes.is_main and mine else None)
    if processes.is_main:
        yield mine
        return
    with TemporaryDirectory(prefix="qlora-") as room:
        yield _unpacked(sent, Path(room))


def _packed(folder: Path) -> Payload:
    """The files of a checkpoint, byte for byte."""
    return Payload({file.name: _bytes_of(file) for file in sorted(folder.iterdir()) if file.is_file()}, folder.name)


def _unpacked(parcel: Payload, room: Path) -> Saved:
    folder = room / str(parcel.note)
    folder.mkdir()
    for name, content in parcel.tensors.items():
        write_bytes(folder / name, content.cpu().numpy().tobytes())
    return read(folder)


def _bytes_of(file: Path) -> Tensor:
    content = bytearray(file.read_bytes())
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
