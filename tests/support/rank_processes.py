"""The ranks of one run, forked from the test process with everything imported: gloo, as a launcher would start them."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState

from support.child_processes import Child, Notify


def pair(work: Callable[[int, Notify], int | None], folder: Path) -> list[Child]:
    """Start `work(rank, notify)` in two ranks."""
    return ranks(work, folder, 2)


def ranks(work: Callable[[int, Notify], int | None], folder: Path, world_size: int) -> list[Child]:
    """Start `work(rank, notify)` in `world_size` ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [Child(_ranked(work, rank, world_size, port), folder / f"log-{rank}") for rank in range(world_size)]


def _ranked(
    work: Callable[[int, Notify], int | None], rank: int, world_size: int, port: int
) -> Callable[[Notify], int | None]:
    def ranked(notify: Notify) -> int | None:
        for state in (AcceleratorState, PartialState, GradientState):
            state._shared_state.clear()  # as in a new process
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        return work(rank, notify)

    return ranked
