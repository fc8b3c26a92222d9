"""Chunks of rows encoded in forked worker processes, results in order; the chunk of a dead worker is redone.

What a worker gives is what this process would have given: a row's encoding depends on nothing but the row. Pickle is
spoken only over pipes between a process and its own children.
"""

import multiprocessing as mp
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from qlora.errors import DataError


class Placed(Protocol):
    """What can be encoded: a row with the place it came from."""

    where: str


Chunk = Sequence[Any]  # of Placed
Workload = Callable[[Chunk], list[Any]]  # as many results as rows

WORTH_CHUNKS = 2  # encoded before workers are started: a smaller set is done sooner than they are
_MAX_WORKERS = 16
_WORKER_BYTES = 256 * 2**20  # what a worker may come to hold of its own
_CHUNK_SECONDS = 30.0  # of silence, before a worker is taken for lost; an honest chunk takes one or two
_ROW_SECONDS = 8.0  # for one row alone, once its chunk was lost


def available() -> int:
    """Worker processes that this machine has cores and memory for; 1 where it can't fork."""
    if not hasattr(os, "fork") or mp.current_process().daemon:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, StopIteration):  # not Linux: no bound by memory
        lines = Path("/proc/meminfo").read_text().splitlines()
        kibibytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        cores = min(cores, int(kibibytes) * 1024 // _WORKER_BYTES)
    return max(1, min(cores, _MAX_WORKERS))


def in_order(work: Workload, chunks: Iterator[Chunk], count: int) -> Iterator[tuple[Chunk, list[Any]]]:
    """Each chunk with what `work` makes of it, by `count` workers (1: by this process). DataError for a deadly row."""
    if count < 2:
        yield from ((chunk, work(chunk)) for chunk in chunks)
        return
    crew = WorkerPool(work, count)
    try:
        yield from crew.run(chunks)
    finally:
        crew.close()


@dataclass(eq=False)
class _Task:
    chunk: Chunk
    made: list[Any] | None = None


@dataclass(eq=False)
class _Worker:
    process: Any
    pipe: Connection
    task: _Task | None = None
    since: float = 0.0

    def give(self, task: _Task) -> None:
        """Hand over a chunk; a dead worker is noticed when it is asked for the answer."""
        self.task, self.since = task, time.monotonic()
        with suppress(OSError):
            self.pipe.send(task.chunk)


class WorkerPool:
    """Worker processes that encode chunks."""

    def __init__(self, work: Workload, count: int) -> None:
        self._work, self._context = work, mp.get_context("fork")
        self._workers: list[_Worker] = []
        self._spare: _Worker | None = None  # redoes rows one by one
        for _ in range(count):
            self._workers.append(self._hire())

    def run(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, list[Any]]]:
        """Each chunk with its results; at most two chunks a worker are held."""
        tasks: deque[_Task] = deque()
        while True:
            while len(tasks) < 2 * len(self._workers) and (idle := self._idle()):
                if (chunk := next(chunks, None)) is None:
                    break
                tasks.append(_Task(chunk))
                idle.give(tasks[-1])
            if not tasks:
                return
            while tasks and (made := tasks[0].made) is not None:
                yield tasks.popleft().chunk, made
            if tasks and tasks[0].made is None:
                self._collect()

    def close(self) -> None:
        """End all workers; none is waited for longer than it takes to die."""
        for worker in [*self._workers, *([self._spare] if self._spare else [])]:
            _dismiss(worker)
        self._workers, self._spare = [], None

    def _idle(self) -> _Worker | None:
        return next((worker for worker in self._workers if worker.task is None), None)

    def _collect(self) -> None:
        """Take what workers have finished; put a new one in the place of each that died or fell silent."""
        busy = {worker.pipe: worker for worker in self._workers if worker.task}
        ready = wait(list(busy), timeout=1.0)
        for pipe, worker in busy.items():
            lost = time.monotonic() - worker.since > _CHUNK_SECONDS
            if pipe in ready or lost:
                self._take(worker, lost and pipe not in ready)

    def _take(self, worker: _Worker, silent: bool) -> None:
        task, worker.task = worker.task, None
        made = None if silent else _answer(worker, _CHUNK_SECONDS)
        if task and made is None:
            _dismiss(worker)
            made = self._redo(task.chunk)
            self._workers[self._workers.index(worker)] = self._hire()
        if task:
            task.made = made

    def _redo(self, chunk: Chunk) -> list[Any]:
        """A lost chunk again, row by row, so that a row that ends its worker twice can be named."""
        made = []
        for row in chunk:
            found = self._alone(row)
            if found is None:
                raise DataError(
                    f"{row.where}: encoding this row ends its worker process or takes more than {_ROW_SECONDS:.0f} s "
                    "(out of memory?). Take the row out, or shorten it."
                )
            made += found
        return made

    def _alone(self, row: Placed) -> list[Any] | None:
        """What a worker of its own makes of a row; of two of them where the first one died. None for a deadly row."""
        for _ in range(2):
            self._spare = self._spare or self._hire()
            self._spare.give(_Task([row]))
            made = _answer(self._spare, _ROW_SECONDS)
            if made is not None:
                return made
            silent = time.monotonic() - self._spare.since >= _ROW_SECONDS
            _dismiss(self._spare)
            self._spare = None
            if silent:
                break
        return None

    def _hire(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        others = [*self._workers, *([self._spare] if self._spare else [])]
        inherited = [ours, *(worker.pipe for worker in others if not worker.pipe.closed)]
        process = self._context.Process(target=_serve, args=(self._work, theirs, inherited), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)


def _answer(worker: _Worker, seconds: float) -> list[Any] | None:
    """What a worker sends; None if it died or sends nothing in time. An error of the work itself is raised here."""
    try:
        made = worker.pipe.recv() if worker.pipe.poll(seconds) else None
    except (EOFError, OSError):
        return None
    if isinstance(made, Exception):
        raise made
    return made  # type: ignore[no-any-return]


def _dismiss(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.kill()
    worker.process.join()


def _serve(work: Workload, pipe: Connection, inherited: Sequence[Connection]) -> None:
    """A worker's life: chunks in, results out, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:  # held open here, they would hide the parent's end from the other workers
        other.close()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not come along through the fork
    with suppress(EOFError, OSError):
        while True:
            chunk = pipe.recv()
            try:
                made: Any = work(chunk)
            except Exception as error:  # told to the parent, who raises it
                made = error
            pipe.send(made)
