"""The compute dtype: chosen from the recipe, the checkpoint's dtype and the device, before a weight is read."""

import torch

from qlora.errors import BaseModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 in hardware (NVIDIA: compute capability 8.0 on; CPUs always, if slowly)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def choose_dtype(setting: str, checkpoint_dtype: torch.dtype | None, bfloat16: bool) -> torch.dtype:
    """The compute dtype. `auto`: bfloat16 for a 16-bit checkpoint where the device has `bfloat16`, else float32.

    `auto` never picks float16: its gradients overflow without loss scaling.
    BaseModelError for bfloat16 on a device without it.
    """
    if setting == "bfloat16" and not bfloat16:
        raise BaseModelError(
            "model.dtype: this GPU has no bfloat16 (compute capability below 8.0). Allowed here: float32, auto."
        )
    if setting != "auto":
        return DTYPES[setting]
    if checkpoint_dtype in (torch.bfloat16, torch.float16):
        return torch.bfloat16 if bfloat16 else torch.float32
    return torch.float32
