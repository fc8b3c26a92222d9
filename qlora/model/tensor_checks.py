"""Checks of a base's tensors while it loads: dtype, shape, finite values, and that none is missing at the end."""

from pathlib import Path

import torch
from torch import Tensor, nn

from qlora.errors import BaseModelError
from qlora.model.buffers import unset_buffers
from qlora.model.dtypes import dtype_name
from qlora.quant.linear import FLOATS

LISTED = 5  # names in a message


def check_dtype(folder: Path, key: str, tensor: Tensor) -> None:
    """BaseModelError unless a tensor of weights is stored in 16 or 32 bits, or has been decoded to them."""
    if tensor.dtype not in FLOATS:
        raise BaseModelError(
            f"model: {folder}: {key!r} is stored as {dtype_name(tensor.dtype)}, without the scales of a format that "
            f"can be decoded, such as {key}_scale_inv or {key}_scale. Fetch the folder again, or take the 16-bit "
            "checkpoint."
        )


def check_values(folder: Path, key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """BaseModelError unless a tensor has the shape that config.json needs, and only finite values."""
    is_float = tensor.is_floating_point() and tensor.numel() > 0
    if is_float and not all(bool(end.isfinite()) for end in torch.aminmax(tensor)):
        raise BaseModelError(f"model: {folder}: {key!r} holds NaN or infinity. Is the file damaged?")
    if tuple(tensor.shape) != shape:
        raise BaseModelError(f"model: {folder}: {key!r} is {list(tensor.shape)}, but config.json needs {list(shape)}.")


def check_complete(folder: Path, model: nn.Module) -> None:
    """BaseModelError, with their names, for parameters without values and buffers that nothing has set."""
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise BaseModelError(f"model: {folder} lacks {_listed(missing)}. Fetch the folder again.")
    unset = list(unset_buffers(model))
    if unset:
        raise BaseModelError(
            f"model: {folder}: no value for the buffers {_listed(unset)}: they are not in the files, and "
            f"{type(model).__name__} does not compute them. Fetch the folder again."
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
