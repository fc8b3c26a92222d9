"""Fail-fast watchdog: when one rank fails, the others exit with the same error instead of blocking in a collective.

Every rank polls the TCPStore of the launcher's rendezvous for a reported failure, and checks that the other ranks on
its machine are alive. After a failure the main thread has GRACE_SECONDS to end, then the process is terminated: a
collective on a GPU would block for minutes.
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

POLL_SECONDS = 0.5  # between two polls
GRACE_SECONDS = 5.0  # for the main thread to notice the failure
REPORT_SECONDS = 2.0  # that a rank whose collective failed waits for the report of the rank that caused it
RENDEZVOUS_SECONDS = 600.0  # for the slowest rank to join
STORE_SECONDS = 5.0  # for an answer of the store


class Watchdog:
    """Wraps a run: `start` when the process group exists, `stop` when no rank needs another one any more."""

    def __init__(self) -> None:
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._store: Any = None
        self._local_peers: dict[int, tuple[int, str]] = {}  # rank -> pid and start time, of the others on this machine
        self._stopped = threading.Event()
        self._reported_elsewhere = False  # another rank has reported the failure

    def start(self) -> None:
        """Watch the other ranks from now on. Every rank calls it, once the process group exists."""
        if self.world_size < 2:
            return
        self._store = _connect()
        self._store.set(f"process/{self.rank}", f"{_machine()} {os.getpid()} {_start_time(os.getpid())}")
        ranks = range(self.world_size)
        self._store.wait([f"process/{rank}" for rank in ranks], timedelta(seconds=RENDEZVOUS_SECONDS))
        for rank in ranks:
            machine, pid, start_time = self._store.get(f"process/{rank}").decode().split(" ")
            if machine == _machine() and rank != self.rank:
                self._local_peers[rank] = int(pid), start_time
        threading.Thread(target=self._watch, args=(_connect(),), daemon=True, name="watchdog").start()

    def stop(self) -> None:
        """Stop watching. Every rank calls it, after a barrier."""
        self._stopped.set()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """One rank reports an error: ReportedByOtherRank on the others, QloraError if a rank died without a report."""
        self._stopped.set()  # from here on the main thread reads the store
        if error is None or self.world_size < 2 or isinstance(error, ReportedByOtherRank | SystemExit):
            return
        code = getattr(error, "exit_code", 1)
        if self._store is None:  # the rendezvous is not complete: only local rank 0 reports
            if os.environ.get("LOCAL_RANK", "0") != "0":
                raise ReportedByOtherRank(code) from None
            return
        failure = self._failure(REPORT_SECONDS if isinstance(error, RuntimeError) else 0.0)
        if not self._claims_report(failure or str(error)):
            raise ReportedByOtherRank(code) from None
        if failure:
            raise QloraError(failure) from None

    def _watch(self, store: Any) -> None:
        """The watching thread: polls the store until a rank fails or the run ends."""
        while not self._stopped.wait(POLL_SECONDS):
            failure = self._current_failure(store)
            if failure is None:
                continue
            if self._stopped.wait(GRACE_SECONDS):
                return
            if self._claims_report(failure):
                os.write(2, redacted(f"error: {failure}\n").encode())
            os._exit(1)

    def _failure(self, timeout: float) -> str | None:
        """The failure of another rank that made this one fail; None if there is none after `timeout` seconds."""
        _wait_until(lambda: self._current_failure(self._store) is not None, timeout)
        return self._current_failure(self._store)

    def _current_failure(self, store: Any) -> str | None:
        """The failure that a rank has reported, or that a rank on this machine is dead; None if there is none."""
        dead = self._dead_peer()
        try:
            if self._is_alive(0) and store.check(["failed"]):
                self._reported_elsewhere = True
                store.set(f"read/{self.rank}", "")
                return str(store.get("failed").decode())
        except RuntimeError:  # the process that serves the store has ended
            pass
        return dead

    def _dead_peer(self) -> str | None:
        """A message about the first other rank on this machine that has ended; None if all are alive."""
        for rank in self._local_peers:
            if not self._is_alive(rank):
                return (
                    f"rank {rank} of {self.world_size} ended without an error message; it may have been killed for "
                    "lack of memory. Run the same command again: it resumes from the newest checkpoint."
                )
        return None

    def _claims_report(self, message: str) -> bool:
        """Whether this rank is the one that prints the error; the other ranks receive the message."""
        if self._reported_elsewhere:
            return False
        try:
            if self._is_alive(0):
                return self._publish(message)
        except RuntimeError:
            pass
        # The store ended with rank 0: the lowest rank left on this machine reports, after the others have ended.
        if any(self._is_alive(rank) for rank in self._local_peers if rank < self.rank):
            return False
        _wait_until(lambda: not any(self._is_alive(rank) for rank in self._local_peers), GRACE_SECONDS)
        return True

    def _publish(self, message: str) -> bool:
        """Whether this is the first failure; then the other ranks have read the message when this returns."""
        if self._store.add("reports", 1) > 1:
            return False
        self._store.set("failed", f"rank {self.rank} of {self.world_size}: {message}")
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        _wait_until(lambda: all(self._has_read(rank) for rank in others), REPORT_SECONDS)
        return True

    def _has_read(self, rank: int) -> bool:
        """Whether another rank has read the message, or is dead."""
        return not self._is_alive(rank) or bool(self._store.check([f"read/{rank}"]))

    def _is_alive(self, rank: int) -> bool:
        """Whether another rank is alive; true for ranks on other machines, whose processes can't be seen."""
        pid, start_time = self._local_peers.get(rank, (0, ""))
        return not pid or _start_time(pid) == start_time


def report_once(work: Callable[[], Any]) -> Any:
    """The result of `work`. If it fails on every rank of a launch, only local rank 0 reports the error."""
    with Watchdog():
        return work()


def _connect() -> Any:
    """A new connection to the TCPStore of the launcher's rendezvous."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=STORE_SECONDS)
    store = TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    return PrefixStore("qlora", store)


def _wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    """Wait until `condition` holds, at most `timeout` seconds; whether it holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True


def _machine() -> str:
    """An id of this machine and its pid namespace: two processes with the same id can see each other's pids."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    machine = boot_id.read_text().strip() if boot_id.exists() else socket.gethostname()
    namespace = Path("/proc/self/ns/pid")
    return f"{machine}/{os.readlink(namespace) if namespace.exists() else ''}"


def _start_time(pid: int) -> str:
    """The start time of a process in kernel ticks; empty if the process has exited or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
