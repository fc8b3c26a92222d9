"""Streams and events of the pretended GPU: the compute stream runs at once, copies on side streams as late as is legal.

A copy that nothing waits for never runs, so a wait that is missing changes the numbers. Independently of that, every
storage has the time of its last use, and every copy the time up to which its stream waited: a copy that may overtake
the computation, and a computation that may overtake a copy, are violations at the line that causes them.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from support.pretended_gpu.counters import Counters, package_line
from support.pretended_gpu.storages import Clock, StorageState, host_state, on_gpu, state_of


class Copy:
    """One queued copy. It keeps no storage alive: the caching allocator would not wait for it either."""

    def __init__(self, target: Tensor, source: Tensor, counters: Counters) -> None:
        self.counters, self.line = counters, package_line()
        self._ends = [self._description(target, "target"), self._description(source, "source")]
        self._freed: dict[str, tuple[int, bool]] = {}  # end -> time, and whether it was on the GPU
        self.complete = self.host_knows = False
        self._states = (host_state_or(target), host_state_or(source))
        self._states[0].writing.append(self)
        self._states[1].reading.append(self)

    def _description(self, tensor: Tensor, end: str) -> tuple[Any, ...]:
        was_on_gpu = on_gpu(tensor)
        freed = lambda _: None if self.complete else self._freed.setdefault(end, (Clock.now, was_on_gpu))  # noqa: E731
        reference = weakref.ref(tensor.untyped_storage(), freed)
        return end, reference, tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()

    @torch.no_grad()
    def run(self) -> None:
        """Copy now, unless an end was freed: memory of the GPU may be in use again, host memory is unmapped."""
        self.complete = True
        views = []
        for end, reference, dtype, offset, shape, stride in self._ends:
            storage = reference()
            if storage is None:
                time, was_on_gpu = self._freed[end]
                if not was_on_gpu or time < Clock.now:
                    self.counters.violation(f"{end} freed before its copy was waited for", self.line)
                return self.forget()
            views.append(torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride))
        views[0].copy_(views[1])

    def forget(self) -> None:
        """From here on the host knows that the copy is complete."""
        self.host_knows = True
        for copies in (self._states[0].writing, self._states[1].reading):
            if self in copies:
                copies.remove(self)


def host_state_or(tensor: Tensor) -> StorageState:
    """The state of a storage; in host memory it is created."""
    return state_of(tensor) or host_state(tensor)


class Marker:
    """A CUDA event: a place in the queue of a side stream; on the compute stream everything before it has run."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.stream: Stream | None = None
        self.position = self.launches = 0

    def record(self, stream: Any = None) -> None:
        """Mark the end of the stream's queue."""
        stream = stream or current()
        self.stream, self.position = stream, stream.issued
        self.launches = gpu().counters.launch_count

    def synchronize(self) -> None:
        """Block the host until everything before the event is complete."""
        gpu().counters.sync("Event.synchronize")
        if self.stream is not None:
            self.stream.finish(self.position, host=True)

    wait = synchronize

    def query(self) -> bool:
        """Whether the event has occurred."""
        return self.stream is None or self.stream.done >= self.position

    def elapsed_time(self, other: Any) -> float:
        """The time between two events: kernel launches, the only thing that takes time here."""
        return float(max(1, other.launches - self.launches))


class Stream:
    """A side stream: its copies run when somebody waits for them."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.queue: list[Copy] = []
        self.unsynced: list[Copy] = []  # complete for the compute stream, not known to the host
        self.done = self.issued = 0
        self.waited_for = 0  # time of the compute stream up to which this one waited
        self.stream_id, self.device = id(self), torch.device("cuda", 0)
        gpu().streams.add(self)

    def push(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy."""
        counters = gpu().counters
        for name, tensor in (("source", source), ("target", target)):
            state = state_of(tensor)
            if state is not None and state.on_gpu:
                time = state.used if name == "target" else state.written
                if time > self.waited_for:
                    counters.violation(f"a copy may start before the computation that uses its {name} is over")
        self.queue.append(Copy(target, source, counters))
        self.issued += 1

    def finish(self, position: int | None = None, host: bool = False) -> None:
        """Run what is queued before `position`; `host`: the host knows it afterwards."""
        while self.queue and (position is None or self.done < position):
            self.done += 1
            copy = self.queue.pop(0)
            with gpu().unseen():
                copy.run()
            self.unsynced.append(copy)
        if host:
            for copy in self.unsynced:
                copy.forget()
            self.unsynced.clear()

    def wait_stream(self, other: Any) -> None:
        """What is queued from here on starts after everything given to `other` so far."""
        if isinstance(other, ComputeStream):
            if gpu().side_streams_wait:
                self.waited_for = Clock.now
        else:
            other.finish()

    def wait_event(self, event: Marker) -> None:
        """The same for everything before an event."""
        if isinstance(event.stream, ComputeStream):
            self.wait_stream(event.stream)
        elif event.stream is not None:
            event.stream.finish(event.position)

    def record_event(self, event: Marker | None = None) -> Marker:
        """An event behind everything queued so far."""
        event = event or Marker()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Block the host until everything queued is complete."""
        gpu().counters.sync("Stream.synchronize")
        self.finish(host=True)

    def query(self) -> bool:
        """Whether everything queued is complete."""
        return not self.queue


class ComputeStream(Stream):
    """The stream that operators run on."""

    def wait_stream(self, other: Any) -> None:
        """Work from here on starts after everything given to `other`."""
        if gpu().compute_waits:
            other.finish()

    def wait_event(self, event: Marker) -> None:
        """Work from here on starts after the event."""
        if gpu().compute_waits and event.stream is not None:
            event.stream.finish(event.position)

    def synchronize(self) -> None:
        """Block the host until everything is complete that this stream waited for."""
        gpu().counters.sync("Stream.synchronize")
        gpu().host_waited()


@contextmanager
def stream_context(stream: Any) -> Iterator[None]:
    """torch.cuda.stream: operators inside go to `stream`."""
    if stream is None:
        yield
        return
    gpu().current.append(stream)
    try:
        yield
    finally:
        gpu().current.pop()


def current(*_: Any) -> Any:
    """torch.cuda.current_stream."""
    return gpu().current[-1]


_gpus: list[Any] = []


def gpu() -> Any:
    """The pretended GPU of the innermost block, also after the block has ended."""
    return _gpus[-1]


def set_gpu(instance: Any) -> None:
    """Let a block's GPU be the current one."""
    _gpus[:] = [instance]
