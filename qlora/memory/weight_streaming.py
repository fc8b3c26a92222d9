"""Weight streaming: frozen layers are packed in host memory, and on the device only while they are used.

Each streamed decoder layer is one flat buffer on the host. Two slots on the device alternate, so that the next layer is
copied while this one computes, in forward and in backward. Resident layers are spread evenly between the streamed ones.
Nothing is copied back to the host. A layer fetches its tensors whenever it rebuilds W (FrozenLinear.stored).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora.memory.activation_recompute import decoder_layers
from qlora.memory.copy_stream import CopyStream, host_bytes
from qlora.quant.linear import FrozenLinear, frozen

SLOTS = 2  # one in use, one being copied
ALIGNMENT = 256  # bytes: the start of a tensor in a buffer, as in CUDA's allocator
TensorSlot = tuple[FrozenLinear, str, int]  # a stored tensor, and its start in the layer's buffer


def streamed_layers(layers: int, resident: int) -> list[int]:
    """The indices of the streamed decoder layers when `resident` of `layers` stay on the device: spread evenly."""
    streamed = max(0, layers - resident)
    return [layer for layer in range(layers) if (layer + 1) * streamed // layers > layer * streamed // layers]


class WeightStreamer:
    """The streamed layers of a model: their host buffers, and the slots on the device."""

    def __init__(self, model: nn.Module, resident: int, copy_stream: CopyStream) -> None:
        """Move the matrices of all but `resident` decoder layers to the host, and stream them from now on."""
        self.copy_stream = copy_stream
        layers = decoder_layers(model)
        self.layers = streamed_layers(len(layers), resident)
        sizes = [_layout(_matrices(layers[layer]))[1] for layer in self.layers]
        slots = min(SLOTS, len(sizes))
        device = copy_stream.device
        self._slots = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(slots)]
        self._slot_layers: list[int | None] = [None] * slots  # which streamed layer each slot holds, or will hold
        self._slot_events: list[Any] = [None] * slots
        self._current: int | None = None
        self._host = [self._move_to_host(layers[layer], number) for number, layer in enumerate(self.layers)]

    @property
    def host_bytes(self) -> int:
        """Host memory of all streamed layers."""
        return sum(buffer.numel() for buffer in self._host)

    @property
    def slot_bytes(self) -> int:
        """Device memory of the slots."""
        return sum(slot.numel() for slot in self._slots)

    def fetch(self, number: int) -> None:
        """Make the compute stream wait for streamed layer `number`; start to copy the next one in this direction."""
        if number == self._current:
            return
        forward = self._current is None or number == 0 or number > self._current
        slot = number % SLOTS
        self._copy(number)
        self.copy_stream.make_compute_wait(self._slot_events[slot])
        self._current = number
        following = number + (1 if forward else -1)
        if 0 <= following < len(self._host) and following % SLOTS != slot:
            self._copy(following)

    def _copy(self, number: int) -> None:
        """Queue the copy of a layer into its slot, unless the slot holds it already."""
        slot, buffer = number % SLOTS, self._host[number]
        if self._slot_layers[slot] == number:
            return
        self.copy_stream.wait_for_compute()  # the slot may still be in use
        self.copy_stream.copy(self._slots[slot][: buffer.numel()], buffer)
        self._slot_layers[slot], self._slot_events[slot] = number, self.copy_stream.record()

    def _move_to_host(self, layer: nn.Module, number: int) -> Tensor:
        """The host buffer of a layer; the layer's tensors become views of its slot."""
        tensor_slots, size = _layout(_matrices(layer))
        buffer, slot = host_bytes(size, self.copy_stream.device), self._slots[number % SLOTS]
        for matrix, name, start in tensor_slots:
            stored: Tensor = getattr(matrix, name)
            span = slice(start, start + stored.nbytes)
            buffer[span].copy_(stored.detach().reshape(-1).view(torch.uint8))
            setattr(matrix, name, frozen(slot[span].view(stored.dtype).view(stored.shape)))
            matrix.fetch = partial(self.fetch, number)
        for matrix in _matrices(layer):  # biases are small, and stay on the device
            matrix.bias = None if matrix.bias is None else frozen(matrix.bias.to(self.copy_stream.device))
        return buffer


def _matrices(layer: nn.Module) -> list[FrozenLinear]:
    return [module for module in layer.modules() if isinstance(module, FrozenLinear)]


def _layout(matrices: Sequence[FrozenLinear]) -> tuple[list[TensorSlot], int]:
    """Where each stored tensor of a layer starts in its buffer, and the size of the buffer."""
    tensor_slots: list[TensorSlot] = []
    end = 0
    for matrix in matrices:
        stored: Mapping[str, Tensor] = matrix.stored()
        for name, tensor in stored.items():
            tensor_slots.append((matrix, name, end))
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return tensor_slots, end


def embed_on_host(model: nn.Module, device: torch.device) -> None:
    """Keep the token embedding in host memory and copy only the rows of each batch; not if it is tied to the head."""
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None and head.weight is embedding.weight:
        return
    embedding.to("cpu")
    embedding.register_forward_pre_hook(lambda module, args: (args[0].to("cpu"), *args[1:]))
    embedding.register_forward_hook(lambda module, args, rows: rows.to(device, non_blocking=True))
    # transformers' `generate` sends all inputs to the device of the first parameter, which is the host from now on.
    model.register_forward_pre_hook(partial(_inputs_on, device), with_kwargs=True)


def _inputs_on(device: torch.device, module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
    """A forward's arguments, tensors moved to `device`."""

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return tuple(map(move, args)), {name: move(value) for name, value in inputs.items()}
