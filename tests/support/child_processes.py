"""Child processes forked from the test process, with everything imported; they report lines through a pipe."""

import gc
import io
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from qlora.runs import setup
from qlora.runs import train as train_module
from qlora.training.checkpoint import Checkpoints
from qlora.training.loss import TokenLoss
from support.training_hooks import before_forward, before_update

Notify = Callable[[str], None]
ChildMain = Callable[[Notify], int | None]
GIVE_UP_SECONDS = 900.0  # generous: the machine may be busy


class Child:
    """A forked child in its own session; its stdout and stderr go to the file `log`."""

    def __init__(self, main: ChildMain, log: Path) -> None:
        self._reader, writer = os.pipe()
        self._received = b""
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._reader)
            _run_child(main, writer, log)
        os.close(writer)

    def lines(self) -> list[str]:
        """The lines that the child has reported so far."""
        while self._reader >= 0 and select.select([self._reader], [], [], 0)[0] and self._read_more():
            pass
        return self._received.decode().splitlines()

    def wait_for(self, line: str, times: int = 1) -> bool:
        """Wait until the child has reported `line` that many times; False if it exited before."""
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while self.lines().count(line) < times and time.monotonic() < deadline:
            ready = select.select([self._reader], [], [], 1.0)[0]
            if ready and not self._read_more():
                return False
        return True

    def send(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for the child's exit; returns its exit code, 128 + n if signal n killed it."""
        deadline = time.monotonic() + GIVE_UP_SECONDS
        done, status = os.waitpid(self.pid, os.WNOHANG)
        while not done and time.monotonic() < deadline:
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
        """1 if a process of the child's session still exists after two seconds, else 0."""
        for _ in range(100):
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return 0
            time.sleep(0.02)
        os.killpg(self.pid, signal.SIGKILL)
        return 1

    def _read_more(self) -> bool:
        chunk = os.read(self._reader, 65536)
        self._received += chunk
        return bool(chunk)


def _run_child(main: ChildMain, writer: int, log: Path) -> None:
    """Run `main` in the child and exit; never returns to the parent's code."""
    code = 1
    try:
        gc.freeze()  # a collection would copy every page of the parent's objects
        os.setsid()
        # torch creates its thread pool again after a fork; two threads that use it first at the same time would fail.
        torch.set_num_threads(1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 2)
        os.dup2(handle, 1)
        sys.stderr = sys.stdout = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
        code = main(lambda line: _write_line(writer, line)) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _write_line(writer: int, line: str) -> None:
    os.write(writer, f"{line}\n".encode())


def kill_at_call(number: int) -> None:
    """From now on the process kills itself before its `number`-th call that uses the file system."""
    remaining = number

    def profile(frame: FrameType, event: str, function: Any) -> None:
        nonlocal remaining
        if event == "c_call" and _uses_files(function):
            remaining -= 1
            if remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)


def _uses_files(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    return getattr(function, "__module__", None) in ("posix", "_io", "io") or isinstance(owner, io.IOBase)


PHASES = ("loading", "tokenizing", "training", "evaluating", "saving", "writing")


@contextmanager
def notify_phases(notify: Notify) -> Iterator[None]:
    """Inside the block a run reports each phase as it begins, and each checkpoint once it is finished."""
    evaluating = False

    def report_evaluation(model: TokenLoss) -> None:
        nonlocal evaluating
        if not model.training and not evaluating:
            notify("evaluating")
        evaluating = not model.training

    def report(module: Any, name: str, phase: str) -> None:
        function = getattr(module, name)

        def reporting(*arguments: Any, **options: Any) -> Any:
            notify(phase)
            result = function(*arguments, **options)
            if phase == "saving":
                notify(f"saved {int(result.name[-6:])}")
            return result

        patch.setattr(module, name, reporting)

    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        report(setup, "load_base", "loading")
        report(setup, "prepare", "tokenizing")
        report(train_module, "write_artifacts", "writing")
        report(Checkpoints, "save", "saving")
        stack.enter_context(before_update(lambda number: notify("training")))
        stack.enter_context(before_forward(report_evaluation))
        yield
