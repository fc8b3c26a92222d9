"""Children forked from this warm process: killed at a call or a moment, signalled in a phase, heard through a pipe."""

import io
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from qlora.runs import train as walk
from qlora.training import loop
from qlora.training.checkpoint import Checkpoints

Tell = Callable[[str], None]
Workload = Callable[[Tell], int | None]
GIVE_UP_SECONDS = 900.0  # of a machine that is busy with other things


class Child:
    """A forked child in a session of its own; what it says on stderr goes to a file."""

    def __init__(self, work: Workload, said: Path) -> None:
        self.said = said
        self._reader, writer = os.pipe()
        self._heard = b""
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._reader)
            _live(work, writer, said)
        os.close(writer)

    def lines(self) -> list[str]:
        """What the child has told so far."""
        while self._reader >= 0 and select.select([self._reader], [], [], 0)[0] and self._more():
            pass
        return self._heard.decode().splitlines()

    def wait_for(self, line: str, times: int = 1) -> bool:
        """Until the child has told `line` so often; False if it ended before."""
        give_up = time.monotonic() + GIVE_UP_SECONDS
        while self.lines().count(line) < times and time.monotonic() < give_up:
            ready = select.select([self._reader], [], [], 1.0)[0]
            if ready and not self._more():
                return False
        return True

    def send(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self) -> int:
        """The exit code, 128 + n where signal n killed it; the child is gone, and so is all that it started."""
        give_up = time.monotonic() + GIVE_UP_SECONDS
        done, status = os.waitpid(self.pid, os.WNOHANG)
        while not done and time.monotonic() < give_up:
            time.sleep(0.002)
            done, status = os.waitpid(self.pid, os.WNOHANG)
        if not done:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise AssertionError(f"the child hung: {self.lines()[-3:]}")
        self.lines()
        os.close(self._reader)
        self._reader = -1
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)

    def orphans(self) -> int:
        """Processes of the child's session that are still there, after a moment to go."""
        for _ in range(100):
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return 0
            time.sleep(0.02)
        os.killpg(self.pid, signal.SIGKILL)
        return 1

    def _more(self) -> bool:
        more = os.read(self._reader, 65536)
        self._heard += more
        return bool(more)


def _live(work: Workload, writer: int, said: Path) -> None:
    """The child's life; it never comes back into the parent's code."""
    code = 1
    try:
        os.setsid()
        torch.set_num_threads(
            1
        )  # torch makes its pool anew after a fork; two threads that ask first at once would fail
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 2)
        os.dup2(handle, 1)
        sys.stderr = sys.stdout = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
        code = work(lambda line: _tell(writer, line)) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _tell(writer: int, line: str) -> None:
    os.write(writer, f"{line}\n".encode())


def die_at_call(number: int) -> None:
    """From now on the process kills itself right before its `number`-th call that reaches the file system."""
    left = number

    def look(frame: FrameType, event: str, what: Any) -> None:
        nonlocal left
        if event == "c_call" and _touches_files(what):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(look)


def _touches_files(what: Any) -> bool:
    owner = getattr(what, "__self__", None)
    return getattr(what, "__module__", None) in ("posix", "_io", "io") or isinstance(owner, io.IOBase)


PHASES = ("loading", "tokenising", "training", "evaluating", "saving", "writing")


def tell_phases(tell: Tell) -> None:
    """Tell each phase of a run as it begins, and each checkpoint once it is finished. For a child."""

    def told(place: Any, name: str, phase: str) -> None:
        work = getattr(place, name)

        def instead(*arguments: Any, **named: Any) -> Any:
            tell(phase)
            return work(*arguments, **named)

        setattr(place, name, instead)

    told(walk, "load_base", "loading")
    told(walk, "prepare", "tokenising")
    told(loop, "_step", "training")
    told(loop, "evaluate", "evaluating")
    told(walk, "leave", "writing")
    told(Checkpoints, "save", "saving")
    save = Checkpoints.save

    def saved(self: Checkpoints, position: Any, *rest: Any) -> Path:
        folder = save(self, position, *rest)
        tell(f"saved {position.step}")
        return folder

    Checkpoints.save = saved  # type: ignore[method-assign]
