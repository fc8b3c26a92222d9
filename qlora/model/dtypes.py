"""Which dtype the model computes in: decided from the base's own and the device, before a weight is read."""

import torch

from qlora.errors import BaseModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 in hardware (NVIDIA: compute capability 8.0 on; CPUs always, if slowly)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def choose(wanted: str, own: torch.dtype | None, bfloat16: bool) -> torch.dtype:
    """The compute dtype. `auto` is the base's own, a 16-bit base in bfloat16 where the device has it, else float32.

    float16 is never picked by itself: its gradients overflow without loss scaling.
    BaseModelError if bfloat16 is asked of a device without it.
    """
    if wanted == "bfloat16" and not bfloat16:
        raise BaseModelError(
            "model.dtype: this card has no bfloat16 (compute capability below 8.0). Allowed here: float32, auto."
        )
    if wanted != "auto":
        return DTYPES[wanted]
    if own in (torch.bfloat16, torch.float16):
        return torch.bfloat16 if bfloat16 else torch.float32
    return torch.float32
