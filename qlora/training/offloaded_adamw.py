"""AdamW with moments in host memory; every update moves them through the device in chunks.

For machines whose driver does not page managed memory (Windows, WSL, some clouds): there the state of bitsandbytes'
paged optimizers stays on the GPU. On a CPU the same code runs, and gives the bits of PyTorch's fused AdamW.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from qlora.memory.copy_stream import CopyStream, host_bytes
from qlora.memory.planner.optimizer_state import CHUNK_VALUES

BUFFERS = 2  # of chunks on the device: one in use, one being copied
MOMENTS = ("exp_avg", "exp_avg_sq")


class Span(NamedTuple):
    """Values start..end of a flattened parameter."""

    parameter: nn.Parameter
    start: int
    end: int

    def of(self, tensor: Tensor) -> Tensor:
        """The span's values of a contiguous tensor of the parameter's size."""
        return tensor.view(-1)[self.start : self.end]


Chunk = list[Span]


class OffloadedStateAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) over parameters of one device, with moments in host memory that it can read."""

    def __init__(self, groups: Sequence[dict[str, Any]], betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(list(groups), {"lr": 1e-3, "betas": betas, "eps": 1e-8, "weight_decay": weight_decay})
        self.copy_stream = CopyStream(self.param_groups[0]["params"][0].device)
        self._buffers: list[Tensor] = []

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Zero moments in host memory, and the number of updates on the parameter's device."""
        count = torch.zeros((), device=parameter.device)
        device = self.copy_stream.device
        moments = {name: host_bytes(4 * parameter.numel(), device).zero_() for name in MOMENTS}
        return {"step": count} | {name: flat.view(torch.float32).view_as(parameter) for name, flat in moments.items()}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update: while a chunk is computed, the next one is copied in and the previous one out."""
        work = [(group, chunk) for group in self.param_groups for chunk in self._chunks(group)]
        self._allocate_buffers([chunk for _, chunk in work])
        self.copy_stream.wait_for_compute()  # which may still use the memory of the buffers
        events = [self._copy_in(number, chunk) for number, (_, chunk) in enumerate(work[:1])]
        for number, (group, chunk) in enumerate(work):
            if number + 1 < len(work):
                events.append(self._copy_in(number + 1, work[number + 1][1]))
            self.copy_stream.make_compute_wait(events[number])
            self._update(group, number, chunk)
            self.copy_stream.wait_for_compute()
            for device_values, host_values in self._moment_pairs(number, chunk):
                self.copy_stream.copy(host_values, device_values)
        self.copy_stream.synchronize()  # so that the moments in host memory are complete, for a checkpoint

    def _chunks(self, group: dict[str, Any]) -> Iterator[Chunk]:
        """The parameters that have a gradient, split or joined into chunks of at most CHUNK_VALUES."""
        chunk, values = Chunk(), 0
        for span in self._spans(group["params"]):
            size = span.end - span.start
            if chunk and values + size > CHUNK_VALUES:
                yield chunk
                chunk, values = Chunk(), 0
            chunk.append(span)
            values += size
        if chunk:
            yield chunk

    def _spans(self, parameters: Sequence[nn.Parameter]) -> Iterator[Span]:
        for parameter in parameters:
            if parameter.grad is None:
                continue
            if not self.state[parameter]:
                self.state[parameter] = self.new_state(parameter)
            for start in range(0, parameter.numel(), CHUNK_VALUES):
                end = min(parameter.numel(), start + CHUNK_VALUES)
                yield Span(parameter, start, end)

    def _allocate_buffers(self, chunks: Sequence[Chunk]) -> None:
        """Device memory for both moments of two chunks, of the size of the largest chunk."""
        values = max((len(MOMENTS) * sum(span.end - span.start for span in chunk) for chunk in chunks), default=0)
        if not self._buffers or self._buffers[0].numel() < values:
            device = self.copy_stream.device
            self._buffers = [torch.empty(values, device=device) for _ in range(min(BUFFERS, len(chunks)))]

    def _copy_in(self, number: int, chunk: Chunk) -> Any:
        """Queue the copy of a chunk's moments into its buffer, behind the copy of what that buffer held before."""
        for device_values, host_values in self._moment_pairs(number, chunk):
            self.copy_stream.copy(device_values, host_values)
        return self.copy_stream.record()

    def _moment_pairs(self, number: int, chunk: Chunk) -> Iterator[tuple[Tensor, Tensor]]:
        """Each moment of each span: its values on the device, and in host memory."""
        buffer, start = self._buffers[number % BUFFERS], 0
        for name in MOMENTS:
            for span in chunk:
                size = span.end - span.start
                yield buffer[start : start + size], span.of(self.state[span.parameter][name])
                start += size

    def _update(self, group: dict[str, Any], number: int, chunk: Chunk) -> None:
        moments = [device_values for device_values, _ in self._moment_pairs(number, chunk)]
        counts = [self.state[span.parameter]["step"] for span in chunk]
        # `adamw` increments `step` in place. A parameter of several spans is counted with its first, which fills a
        # chunk and was updated before; the others pass a copy.
        counts = [count if not span.start else count - 1 for span, count in zip(chunk, counts, strict=True)]
        adamw(
            [span.of(span.parameter) for span in chunk],
            [span.of(span.parameter.grad.contiguous()) for span in chunk],  # type: ignore[union-attr]  # all have one
            moments[: len(chunk)],
            moments[len(chunk) :],
            [],
            counts,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
