"""A pool of forked worker processes that encode chunks of records. Results are in order, lost chunks are encoded again.

A worker's result is what this process would compute: the encoding of a record depends on nothing but the record. Pickle
is used only in the pipes between a process and its own children.
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


class WorkItem(Protocol):
    """A record with its location."""

    where: str


Chunk = Sequence[Any]  # of WorkItem
ChunkFunction = Callable[[Chunk], list[Any]]  # returns one result per item

MIN_CHUNKS = 2  # encoded before workers start: a smaller data set is done before they would be ready
_MAX_WORKERS = 16
_WORKER_BYTES = 256 * 2**20  # memory that a worker may allocate itself
CHUNK_SECONDS = 30.0  # without an answer, before a worker counts as lost; an honest chunk takes one or two
RECORD_SECONDS = 8.0  # for a single record, after its chunk was lost


def available_workers() -> int:
    """The number of worker processes that this machine has cores and memory for; 1 if it can't fork."""
    if not hasattr(os, "fork") or mp.current_process().daemon:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, StopIteration):  # not Linux: no limit by memory
        lines = Path("/proc/meminfo").read_text().splitlines()
        kibibytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        cores = min(cores, int(kibibytes) * 1024 // _WORKER_BYTES)
    return max(1, min(cores, _MAX_WORKERS))


def map_in_order(function: ChunkFunction, chunks: Iterator[Chunk], workers: int) -> Iterator[tuple[Chunk, list[Any]]]:
    """Each chunk with the results of `function`, computed by `workers` processes (1: this process), in order.

    DataError for a record that ends its worker.
    """
    if workers < 2:
        yield from ((chunk, function(chunk)) for chunk in chunks)
        return
    pool = WorkerPool(function, workers)
    try:
        yield from pool.map(chunks)
    finally:
        pool.close()


@dataclass(eq=False)
class _Task:
    chunk: Chunk
    results: list[Any] | None = None


@dataclass(eq=False)
class _Worker:
    process: Any
    pipe: Connection
    task: _Task | None = None
    sent_at: float = 0.0

    def send(self, task: _Task) -> None:
        """Send a chunk. That a worker is dead is noticed when its results are received."""
        self.task, self.sent_at = task, time.monotonic()
        with suppress(OSError):
            self.pipe.send(task.chunk)


class WorkerPool:
    """Forked worker processes that apply `function` to chunks."""

    def __init__(
        self,
        function: ChunkFunction,
        workers: int,
        chunk_seconds: float = CHUNK_SECONDS,
        record_seconds: float = RECORD_SECONDS,
    ) -> None:
        self._function, self._context = function, mp.get_context("fork")
        self._chunk_seconds, self._record_seconds = chunk_seconds, record_seconds
        self._workers: list[_Worker] = []
        self._retry_worker: _Worker | None = None  # encodes the records of a lost chunk one by one
        for _ in range(workers):
            self._workers.append(self._start_worker())

    def map(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, list[Any]]]:
        """Each chunk with its results. At most two chunks per worker are in memory."""
        tasks: deque[_Task] = deque()
        while True:
            while len(tasks) < 2 * len(self._workers) and (idle := self._idle_worker()):
                if (chunk := next(chunks, None)) is None:
                    break
                tasks.append(_Task(chunk))
                idle.send(tasks[-1])
            if not tasks:
                return
            while tasks and (results := tasks[0].results) is not None:
                yield tasks.popleft().chunk, results
            if tasks and tasks[0].results is None:
                self._collect()

    def close(self) -> None:
        """Kill all workers."""
        for worker in [*self._workers, *([self._retry_worker] if self._retry_worker else [])]:
            _stop(worker)
        self._workers, self._retry_worker = [], None

    def _idle_worker(self) -> _Worker | None:
        return next((worker for worker in self._workers if worker.task is None), None)

    def _collect(self) -> None:
        """Receive finished results; replace each worker that died or is silent for too long."""
        busy = {worker.pipe: worker for worker in self._workers if worker.task}
        ready = wait(list(busy), timeout=1.0)
        for pipe, worker in busy.items():
            timed_out = time.monotonic() - worker.sent_at > self._chunk_seconds
            if pipe in ready or timed_out:
                self._receive(worker, timed_out and pipe not in ready)

    def _receive(self, worker: _Worker, timed_out: bool) -> None:
        task, worker.task = worker.task, None
        results = None if timed_out else _results(worker, self._chunk_seconds)
        if task and results is None:
            _stop(worker)
            results = self._retry(task.chunk)
            self._workers[self._workers.index(worker)] = self._start_worker()
        if task:
            task.results = results

    def _retry(self, chunk: Chunk) -> list[Any]:
        """The results of a lost chunk, record by record. DataError names a record that ends its worker again."""
        results = []
        for record in chunk:
            result = self._retry_record(record)
            if result is None:
                raise DataError(
                    f"{record.where}: encoding this record ends its worker process or takes more than "
                    f"{self._record_seconds:.0f} s (out of memory?). Remove or shorten it."
                )
            results += result
        return results

    def _retry_record(self, record: WorkItem) -> list[Any] | None:
        """The result for one record, from a second worker if the first one dies. None if the record ends both."""
        for _ in range(2):
            self._retry_worker = self._retry_worker or self._start_worker()
            self._retry_worker.send(_Task([record]))
            result = _results(self._retry_worker, self._record_seconds)
            if result is not None:
                return result
            timed_out = time.monotonic() - self._retry_worker.sent_at >= self._record_seconds
            _stop(self._retry_worker)
            self._retry_worker = None
            if timed_out:
                break
        return None

    def _start_worker(self) -> _Worker:
        parent_end, child_end = self._context.Pipe()
        others = [*self._workers, *([self._retry_worker] if self._retry_worker else [])]
        inherited = [parent_end, *(worker.pipe for worker in others if not worker.pipe.closed)]
        process = self._context.Process(target=_run_worker, args=(self._function, child_end, inherited), daemon=True)
        process.start()
        child_end.close()
        return _Worker(process, parent_end)


def _results(worker: _Worker, seconds: float) -> list[Any] | None:
    """The results that a worker sends; None if it died or exceeds the time. An exception of the function is raised."""
    try:
        results = worker.pipe.recv() if worker.pipe.poll(seconds) else None
    except (EOFError, OSError):
        return None
    if isinstance(results, Exception):
        raise results
    return results  # type: ignore[no-any-return]


def _stop(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.kill()
    worker.process.join()


def _run_worker(function: ChunkFunction, pipe: Connection, inherited: Sequence[Connection]) -> None:
    """The main loop of a worker: receive chunks and send results until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for connection in inherited:  # left open, they would hide the parent's exit from the other workers
        connection.close()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the fork
    with suppress(EOFError, OSError):
        while True:
            chunk = pipe.recv()
            try:
                results: Any = function(chunk)
            except Exception as error:  # raised again in the parent
                results = error
            pipe.send(results)
