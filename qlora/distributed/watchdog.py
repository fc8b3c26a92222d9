"""One fails, all end: a process that fails tells the others why, once; none waits for one that is gone.

Each process watches the note board that the launcher's rendezvous holds anyway (a TCPStore), and whether the others on
its machine are alive. Whoever finds itself left alone has GRACE_SECONDS to end by itself, then it is ended: a
collective on a card would wait for minutes.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from qlora.errors import QloraError, ReportedByOtherRank
from qlora.utils.redact import redacted

LOOK_SECONDS = 0.5  # between two looks
GRACE_SECONDS = 5.0  # for the computation to notice by itself
HEAR_SECONDS = 2.0  # a failed collective waits for the reason of whoever caused it
MEET_SECONDS = 600.0  # for the slowest process to come
BOARD_SECONDS = 5.0  # for an answer of the note board


class Watchdog:
    """Around a run: `begin` when the processes know each other, `done` when none needs another any more."""

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._board: Any = None
        self._beside: dict[int, tuple[int, str]] = {}  # rank -> pid and start of the others on this machine
        self._over = threading.Event()
        self._heard = False  # why: somebody has said it

    def begin(self) -> None:
        """From here on this process sees the others. Called by all, once their process group is there."""
        if self.world < 2:
            return
        self._board = _board()
        self._board.set(f"process/{self.rank}", f"{_machine()} {os.getpid()} {_started(os.getpid())}")
        self._board.wait([f"process/{rank}" for rank in range(self.world)], timedelta(seconds=MEET_SECONDS))
        for rank in range(self.world):
            machine, pid, started = self._board.get(f"process/{rank}").decode().split(" ")
            if machine == _machine() and rank != self.rank:
                self._beside[rank] = int(pid), started
        threading.Thread(target=self._look, args=(_board(),), daemon=True, name="watch").start()

    def done(self) -> None:
        """Stop watching; called by all after they have waited for each other."""
        self._over.set()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """One process says what went wrong. SaidElsewhere if it is another one, QloraError for one that just died."""
        self._over.set()  # from here on it is this thread that listens
        if error is None or self.world < 2 or isinstance(error, ReportedByOtherRank | SystemExit):
            return
        code = getattr(error, "exit_code", 1)
        if self._board is None:  # they do not know each other yet: the first of each machine speaks
            if os.environ.get("LOCAL_RANK", "0") != "0":
                raise ReportedByOtherRank(code) from None
            return
        gone = self._gone(HEAR_SECONDS if isinstance(error, RuntimeError) else 0.0)
        if not self._speaks(gone or str(error)):
            raise ReportedByOtherRank(code) from None
        if gone:
            raise QloraError(gone) from None

    def _look(self, board: Any) -> None:
        """The watching thread."""
        while not self._over.wait(LOOK_SECONDS):
            gone = self._reason(board)
            if gone is None:
                continue
            if self._over.wait(GRACE_SECONDS):
                return
            if self._speaks(gone):
                os.write(2, redacted(f"error: {gone}\n").encode())
            os._exit(1)

    def _gone(self, patience: float) -> str | None:
        """Who has ended before this process and made it fail, in words; None if nobody."""
        _until(lambda: self._reason(self._board) is not None, patience)
        return self._reason(self._board)

    def _reason(self, board: Any) -> str | None:
        """Why this process is to end: what one that failed has noted, or that another one is dead."""
        dead = self._dead()
        try:
            if self._lives(0) and board.check(["failed"]):
                self._heard = True
                board.set(f"heard/{self.rank}", "")
                return str(board.get("failed").decode())
        except RuntimeError:  # the board went with its process
            pass
        return dead

    def _dead(self) -> str | None:
        """The first other process on this machine that is no more."""
        for rank in self._beside:
            if not self._lives(rank):
                return (
                    f"process {rank} of {self.world} is gone without a word; was it killed, perhaps for memory? "
                    "The same command goes on from the newest checkpoint."
                )
        return None

    def _speaks(self, reason: str) -> bool:
        """Whether this process is the one that says it; the others are told the reason."""
        if self._heard:
            return False
        try:
            if self._lives(0):
                return self._first(reason)
        except RuntimeError:
            pass
        # The board went with its process: the first that is left on this machine speaks, and outlives the others.
        if any(self._lives(rank) for rank in self._beside if rank < self.rank):
            return False
        _until(lambda: not any(self._lives(rank) for rank in self._beside), GRACE_SECONDS)
        return True

    def _first(self, reason: str) -> bool:
        """Whether none has spoken before; then the others have read the reason when this returns."""
        if self._board.add("said", 1) > 1:
            return False
        self._board.set("failed", f"process {self.rank} of {self.world}: {reason}")
        others = [rank for rank in range(self.world) if rank != self.rank]
        _until(lambda: all(self._has_heard(rank) for rank in others), HEAR_SECONDS)
        return True

    def _has_heard(self, rank: int) -> bool:
        """Whether another process has read the reason, or is dead."""
        return not self._lives(rank) or bool(self._board.check([f"heard/{rank}"]))

    def _lives(self, rank: int) -> bool:
        """Whether another process is there, as far as can be seen from this machine."""
        pid, started = self._beside.get(rank, (0, ""))
        return not pid or _started(pid) == started


def one_voice(work: Callable[[], Any]) -> Any:
    """What `work` gives; where it fails for every process of a launch, the first of each machine says so."""
    with Watchdog():
        return work()


def _board() -> Any:
    """Another line to the store at which the launcher's processes met."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=BOARD_SECONDS)
    store = TCPStore(host, port, is_master=False, timeout=patience, wait_for_workers=False)
    return PrefixStore("qlora", store)


def _until(holds: Callable[[], bool], patience: float) -> bool:
    """Wait until it holds, or `patience` seconds have passed; whether it does."""
    give_up = time.monotonic() + patience
    while not holds():
        if time.monotonic() >= give_up:
            return False
        time.sleep(0.05)
    return True


def _machine() -> str:
    """A name for this machine, as far as pids go."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    known = boot.read_text().strip() if boot.exists() else socket.gethostname()
    space = Path("/proc/self/ns/pid")
    return f"{known}/{os.readlink(space) if space.exists() else ''}"


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks; empty for one that is gone or only waits to be buried."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
