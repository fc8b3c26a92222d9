"""Streaming: frozen layers that live packed in host memory and are on the device only while they are used.

Each streamed decoder layer is one flat buffer on the host; two slots on the device take turns, so that the next layer
comes while this one computes, forward and backward. Layers that stay are spread evenly between them. Nothing is ever
copied back: the host's bytes are the base. A layer asks for its tensors whenever it rebuilds W (FrozenLinear.stored).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora.memory.activation_recompute import decoder_layers
from qlora.memory.copy_stream import CopyStream, host_bytes
from qlora.quant.linear import FrozenLinear, frozen

SLOTS = 2  # one in use, one on its way
ALIGNMENT = 256  # bytes: where a tensor may begin in a buffer, as CUDA's allocator has it
Place = tuple[FrozenLinear, str, int]  # a stored tensor and where it begins in its layer's buffer


def streamed_layers(layers: int, resident: int) -> list[int]:
    """Which of `layers` decoder layers come from the host when `resident` stay: spread evenly, as many as are left."""
    streamed = max(0, layers - resident)
    return [layer for layer in range(layers) if (layer + 1) * streamed // layers > layer * streamed // layers]


class WeightStreamer:
    """The layers of a model that come and go; owns their bytes on the host and the slots on the device."""

    def __init__(self, model: nn.Module, resident: int, lane: CopyStream) -> None:
        """Move all but `resident` decoder layers' matrices to the host, wherever they are now, and begin streaming."""
        self.lane = lane
        layers = decoder_layers(model)
        self.layers = streamed_layers(len(layers), resident)
        sizes = [_laid_out(_matrices(layers[layer]))[1] for layer in self.layers]
        slots = min(SLOTS, len(sizes))
        device = lane.device
        self._slots = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(slots)]
        self._holds: list[int | None] = [None] * slots  # which streamed layer is, or will be, in each slot
        self._marks: list[Any] = [None] * slots
        self._current: int | None = None
        self._host = [self._take(layers[layer], number) for number, layer in enumerate(self.layers)]

    @property
    def host_bytes(self) -> int:
        """Main memory of all streamed layers."""
        return sum(buffer.numel() for buffer in self._host)

    @property
    def slot_bytes(self) -> int:
        """Device memory of the slots."""
        return sum(slot.numel() for slot in self._slots)

    def fetch(self, number: int) -> None:
        """Have streamed layer `number` in its slot for the computation, and the next one in this direction set out."""
        if number == self._current:
            return
        ahead = self._current is None or number == 0 or number > self._current
        slot = number % SLOTS
        self._send(number)
        self.lane.wait(self._marks[slot])
        self._current = number
        following = number + (1 if ahead else -1)
        if 0 <= following < len(self._host) and following % SLOTS != slot:
            self._send(following)

    def _send(self, number: int) -> None:
        """Queue the copy of a layer into its slot, unless it is there or under way."""
        slot, buffer = number % SLOTS, self._host[number]
        if self._holds[slot] == number:
            return
        self.lane.follow()  # the slot may still be in use
        self.lane.copy(self._slots[slot][: buffer.numel()], buffer)
        self._holds[slot], self._marks[slot] = number, self.lane.mark()

    def _take(self, layer: nn.Module, number: int) -> Tensor:
        """The buffer of a layer on the host; its tensors become views of its slot."""
        places, size = _laid_out(_matrices(layer))
        buffer, slot = host_bytes(size, self.lane.device), self._slots[number % SLOTS]
        for matrix, name, start in places:
            stored: Tensor = getattr(matrix, name)
            span = slice(start, start + stored.nbytes)
            buffer[span].copy_(stored.detach().reshape(-1).view(torch.uint8))
            setattr(matrix, name, frozen(slot[span].view(stored.dtype).view(stored.shape)))
            matrix.fetch = partial(self.fetch, number)
        return buffer


def _matrices(layer: nn.Module) -> list[FrozenLinear]:
    return [module for module in layer.modules() if isinstance(module, FrozenLinear)]


def _laid_out(matrices: Sequence[FrozenLinear]) -> tuple[list[Place], int]:
    """Where each stored tensor of a layer begins in its buffer, and the buffer's size."""
    places: list[Place] = []
    end = 0
    for matrix in matrices:
        stored: Mapping[str, Tensor] = matrix.stored()
        for name, tensor in stored.items():
            places.append((matrix, name, end))
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return places, end


def embed_on_host(model: nn.Module, device: torch.device) -> None:
    """Keep the token embedding in main memory and send the rows of each batch; a tied one has to stay on the device."""
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None and head.weight is embedding.weight:
        return
    embedding.to("cpu")
    embedding.register_forward_pre_hook(lambda module, args: (args[0].to("cpu"), *args[1:]))
    embedding.register_forward_hook(lambda module, args, rows: rows.to(device, non_blocking=True))
