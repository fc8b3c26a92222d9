"""The compute dtype: chosen from the recipe, the checkpoint's dtype and the device, before a weight is read."""

import re

import torch
from torch import Tensor, nn

from qlora.errors import BaseModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def choose_dtype(setting: str, checkpoint_dtype: torch.dtype | None, bfloat16: bool) -> torch.dtype:
    """The compute dtype. `auto`: for a 16-bit checkpoint bfloat16 where the device has it, else float16; else float32.

    BaseModelError for bfloat16 on a device without it.
    """
    if setting == "bfloat16" and not bfloat16:
        raise BaseModelError(
            "model.dtype: this GPU has no bfloat16 (compute capability below 8.0). Allowed here: auto (float16 here), "
            "float16 or float32."
        )
    if setting != "auto":
        return DTYPES[setting]
    if checkpoint_dtype in (torch.bfloat16, torch.float16):
        return torch.bfloat16 if bfloat16 else torch.float16
    return torch.float32


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what is not quantized, and of every tensor between products: float32 where these are float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def kept_in_float32(model: nn.Module, name: str, dtype: torch.dtype) -> bool:
    """Whether transformers keeps the parameter `name` in float32 in a model of `dtype`, as its class demands."""
    if dtype == torch.float32:
        return False
    patterns = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)


def loaded_dtype(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which transformers holds `name`, whose tensor in the built model is `tensor`."""
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if kept_in_float32(model, name, dtype) else tensor.dtype
