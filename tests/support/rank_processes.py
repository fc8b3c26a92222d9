"""The processes of one run, forked from this warm one: ranks under gloo, as a launcher would start them."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState

from support.child_processes import Child, Tell


def pair(work: Callable[[int, Tell], int | None], home: Path) -> list[Child]:
    """Two ranks at work; `work` is given its rank."""
    return ranks(work, home, 2)


def ranks(work: Callable[[int, Tell], int | None], home: Path, world: int) -> list[Child]:
    """All ranks at work; `work` is given its rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [Child(_ranked(work, rank, world, port), home / f"said-{rank}") for rank in range(world)]


def _ranked(work: Callable[[int, Tell], int | None], rank: int, world: int, port: int) -> Callable[[Tell], int | None]:
    def ranked(tell: Tell) -> int | None:
        for state in (AcceleratorState, PartialState, GradientState):
            state._shared_state.clear()  # as in a process that has not begun
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        return work(rank, tell)

    return ranked
