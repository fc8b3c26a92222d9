"""Where a run goes on is the first process's word: machines that do not share its disk are sent the checkpoint."""

from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from qlora.distributed.parcels import Parcel, send
from qlora.distributed.processes import Processes
from qlora.train.checkpoint import Saved, contents_of, position_of


def agreed(processes: Processes, mine: Saved | None) -> Saved | None:
    """The checkpoint that the first process found, on every process; `mine` is what this one found on its own disk."""
    if processes.world == 1:
        return mine
    first = processes.is_main
    identity = mine.identity if mine else None
    wanted = send(processes, 0, Parcel(note=identity) if first else None).note
    if not processes.any(identity != wanted):
        return mine
    if wanted is None:  # what lies on another machine's disk is not this run's
        return None
    sent = send(processes, 0, _packed(mine) if first and mine else None)
    if first:
        return mine
    found: dict[str, dict[str, Tensor]] = {"adapter": {}, "optimizer": {}}
    for name, value in sent.tensors.items():
        kind, _, key = name.partition("/")
        found[kind][key] = value
    note = sent.note
    return Saved(Path(note["folder"]), position_of(note["position"]), note["fixed"], found)


def _packed(saved: Saved) -> Parcel:
    tensors = {
        f"{kind}/{key}": value for kind, each in contents_of(saved.folder).items() for key, value in each.items()
    }
    note = {"folder": str(saved.folder), "position": asdict(saved.position), "fixed": dict(saved.fixed)}
    return Parcel(tensors, note)
