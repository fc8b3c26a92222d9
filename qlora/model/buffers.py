"""Buffers of a model on `meta`: computed by its class on a device, and which of them nothing has set."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qlora.model.dtypes import loaded_dtype

UNSET = "_qlora_unset"  # mark of a buffer that its class left as allocated


def compute_buffers(model: nn.Module, device: torch.device) -> None:
    """Allocate buffers (rotary frequencies, embedding scales) on `device` and let transformers compute them.

    What the class does not write is marked: it must come from the checkpoint.
    """
    allocated: list[Tensor] = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device=device)
            allocated.append(module._buffers[name])  # type: ignore[arg-type]
        module._is_hf_initialized = False  # type: ignore[assignment]
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # its values come from the files
    model.initialize_weights()  # type: ignore[operator]
    for tensor in allocated:
        if tensor._version == 0:  # no operation has written to it
            setattr(tensor, UNSET, True)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer that checkpoints hold."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def unset_buffers(model: nn.Module) -> Iterator[str]:
    """Names of the buffers that neither the class nor a checkpoint has set: they hold arbitrary memory."""
    return (name for name, buffer in model.named_buffers() if getattr(buffer, UNSET, False) and buffer.numel())


def tensors_of_other_dtype(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Name -> dtype of the stored floating-point tensors that a class holds in another dtype than the model's."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **persistent_buffers(model)}
    held = {name: loaded_dtype(model, name, tensor, dtype) for name, tensor in tensors.items()}
    return {name: other for name, other in held.items() if other != dtype and other.is_floating_point}
