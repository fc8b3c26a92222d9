"""The pretended GPU's operators: every call of torch passes here, with the tensors that it reads and writes.

Numbers are computed on the CPU. An operator on tensors of the GPU gives tensors of the GPU; one that gets tensors of
both sides is a violation, as are reads and writes that a queued copy may overtake.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from support.pretended_gpu.counters import Counters
from support.pretended_gpu.kernels import COMPOSED, KERNELS
from support.pretended_gpu.operators import (
    RAW_POINTERS,
    OperatorFacts,
    facts_of,
    may_mix,
    tensors_in,
    wait_reason,
    written_tensors,
)
from support.pretended_gpu.pinned import PinnedMemory
from support.pretended_gpu.storages import (
    NATIVE_DEVICE,
    NATIVE_TO,
    Clock,
    StorageState,
    host_state,
    is_gpu,
    on_gpu,
    put_on_gpu,
    state_of,
)
from support.pretended_gpu.streams import ComputeStream, Stream, set_gpu

Operator = Callable[..., Any]


class PretendedGpu(TorchDispatchMode):
    """The GPU of one block: its streams, its counters, and what a test lets it leave out."""

    def __init__(
        self, strict: bool = True, compute_waits: bool = True, side_streams_wait: bool = True, index: int = 0
    ) -> None:
        super().__init__()
        self.device = torch.device("cuda", index)
        self.counters, self.pinned = Counters(strict), PinnedMemory()
        self.compute_waits, self.side_streams_wait = compute_waits, side_streams_wait
        self.streams: set[Stream] = set()
        self._unseen = self._allocating = 0
        set_gpu(self)
        self.current: list[Stream] = [ComputeStream()]

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Operators of the pretended GPU itself."""
        self._unseen += 1
        try:
            yield
        finally:
            self._unseen -= 1

    @contextmanager
    def allocating(self) -> Iterator[None]:
        """Inside the block, tensors that C++ creates for the CPU are the GPU's."""
        self._allocating += 1
        try:
            yield
        finally:
            self._allocating -= 1

    @property
    def inside_kernel(self) -> bool:
        """Whether an operator is running."""
        return self._unseen > 0

    def host_waited(self) -> None:
        """The host has waited for the compute stream, and so for every copy that this one waited for."""
        for stream in self.streams:
            for copy in stream.unsynced:
                copy.forget()
            stream.unsynced.clear()

    def synchronize(self, *_: Any) -> None:
        """torch.cuda.synchronize: everything is complete."""
        self.counters.sync("torch.cuda.synchronize")
        for stream in self.streams:
            stream.finish(host=True)

    def wait(self, reason: str) -> None:
        """The host waits for the compute stream."""
        self.counters.sync(reason)
        self.host_waited()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):  # its class calls the operator on the shards
            return NotImplemented
        if self._unseen:
            return operator(*args, **kwargs)
        tensors = tensors_in(*args, *kwargs.values())
        facts = facts_of(operator)
        states = [state_of(tensor) for tensor in tensors]
        if any(state is not None and state.on_gpu for state in states):
            return self._on_gpu(operator, facts, (args, kwargs), list(zip(tensors, states, strict=True)))
        if is_gpu(kwargs.get("device")) or (self._allocating and facts.name == "aten::empty"):
            return self._create(operator, facts, args, kwargs)
        if kwargs.get("pin_memory"):
            return self.pinned.pin(operator(*args, **{**kwargs, "pin_memory": False}))
        if any(states):
            self._check_host(facts, args, kwargs, states)
        return operator(*args, **kwargs)

    def _create(self, operator: Operator, facts: OperatorFacts, args: Any, kwargs: dict[str, Any]) -> Any:
        """A new tensor on the GPU: no other tensor of the call is there."""
        if facts.name == "aten::_to_copy":
            return self.move(args[0], True, kwargs.get("dtype"), bool(kwargs.get("non_blocking")))
        if facts.launches:
            self.counters.launches[facts.name] += 1
        return put_on_gpu(operator(*args, **{**kwargs, "device": "cpu"}), Clock.tick())

    def _on_gpu(self, operator: Operator, facts: OperatorFacts, call: Any, operands: Any) -> Any:
        args, kwargs = call
        self._check_devices(facts, args, operands)
        if composed := COMPOSED.get(facts.name):
            with self:
                return composed(*args, **kwargs)
        if reason := wait_reason(facts, args):
            self.wait(reason)
        if facts.name == "aten::copy_" and on_gpu(args[0]) != on_gpu(args[1]):
            return self._copy_across(*args, **kwargs)
        written = written_tensors(facts, args, kwargs)
        if facts.launches:
            self._use([state for _, state in operands if state is not None], written)
            self.counters.launches[facts.name] += 1
        kernel = KERNELS.get(facts.name, operator)
        with self.unseen():
            output = kernel(*args, **_without_gpu(kwargs))
        # C++ passes the true device of a tensor where it means the same device: in moves and in formulas of backward.
        is_same = facts.name == "aten::_to_copy" or torch._C._current_graph_task_id() >= 0
        device = None if is_same else kwargs.get("device")
        _mark_outputs(output, [tensor for tensor, _ in operands], device, Clock.now)
        return output

    def _use(self, states: Sequence[StorageState], written: Sequence[Tensor]) -> None:
        """A kernel of the compute stream uses storages, and writes some of them."""
        time, written_states = Clock.tick(), [state_of(tensor) for tensor in written]
        for state in states:
            if not state.managed:
                self._check_order(state, state in written_states)
            state.used = time
        for state in written_states:
            if state is not None:
                state.written = time

    def _check_devices(self, facts: OperatorFacts, args: Sequence[Any], operands: Any) -> None:
        """All tensors are on the GPU, but scalars, copies, indices, and memory that the driver pages."""
        scalars = not facts.name.startswith(RAW_POINTERS)
        host = [
            tensor
            for tensor, state in operands
            if (state is None or not (state.on_gpu or state.managed)) and not (scalars and tensor.dim() == 0)
        ]
        if host and not may_mix(facts, args) and not all(NATIVE_DEVICE(tensor).type == "meta" for tensor in host):
            shapes = [f"{tuple(tensor.shape)} {'GPU' if on_gpu(tensor) else 'host'}" for tensor, _ in operands]
            self.counters.violation(f"{facts.name}: tensors on both devices: {', '.join(shapes)}")

    def _check_order(self, state: StorageState, is_written: bool) -> None:
        """Nothing that a queued copy writes is used, and nothing that it reads is written."""
        if any(not copy.complete for copy in state.writing):
            self.counters.violation("used before the copy into it was waited for")
        if is_written and any(not copy.complete for copy in state.reading):
            self.counters.violation("written before the copy of it was waited for")

    def _check_host(self, facts: OperatorFacts, args: Any, kwargs: Any, states: Sequence[StorageState | None]) -> None:
        """The same for operators on host memory, to which a copy is complete when the host has waited for it."""
        written = [state_of(tensor) for tensor in written_tensors(facts, args, kwargs)]
        for state in states:
            if state is not None and facts.launches and state.writing:
                self.counters.violation("host memory used before the host waited for the copy into it")
            if state is not None and state in written and state.reading:
                self.counters.violation("host memory written before the host waited for the copy of it")

    def _copy_across(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """A copy between host and GPU; on a side stream it is queued."""
        direction = "host to GPU" if on_gpu(target) else "GPU to host"
        stream = self.current[-1]
        self._count_copy(direction, source if on_gpu(target) else target, non_blocking)
        if not isinstance(stream, ComputeStream):
            stream.push(target, source)
            return target
        self._use([host_state(target), host_state(source)], [target])
        with self.unseen():
            return target.copy_(source)

    def _count_copy(self, direction: str, host: Tensor, non_blocking: bool) -> None:
        side = not isinstance(self.current[-1], ComputeStream)
        memory = "pinned" if self.pinned.is_pinned(host) else "pageable"
        self.counters.copy(f"{direction}, {memory}, {'copy' if side else 'compute'} stream")
        self.counters.launches["copy"] += not side
        if direction == "GPU to host" and non_blocking and not side:
            self.counters.violation("a copy to the host without an event to wait for")
        if not non_blocking or (memory == "pageable" and direction == "host to GPU"):
            self.wait(f"{'blocking' if not non_blocking else 'pageable'} copy, {direction}")

    def move(self, tensor: Tensor, to_gpu: bool, dtype: torch.dtype | None, non_blocking: bool = False) -> Tensor:
        """A copy of a tensor on the other device."""
        if not isinstance(self.current[-1], ComputeStream):
            self.counters.violation("a tensor is moved on a side stream, whose memory the compute stream may reuse")
        self._count_copy("host to GPU" if to_gpu else "GPU to host", tensor, non_blocking)
        self._use([host_state(tensor)], [])
        with self.unseen():
            moved = NATIVE_TO(tensor, dtype=dtype or tensor.dtype, copy=True)
        return put_on_gpu(moved, Clock.tick()) if to_gpu else moved


def _without_gpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "device": "cpu"} if is_gpu(kwargs.get("device")) else kwargs


def _mark_outputs(output: Any, inputs: Sequence[Tensor], device: Any, time: int) -> None:
    """New storages are the GPU's, unless the call named another device."""
    if device is not None and not is_gpu(device):
        return
    storages = {id(tensor.untyped_storage()) for tensor in inputs}
    for tensor in tensors_in(output):
        if id(tensor.untyped_storage()) not in storages:
            put_on_gpu(tensor, time)
