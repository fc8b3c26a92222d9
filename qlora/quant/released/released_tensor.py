"""Base class of the released formats: the tensors of one matrix or of a stack, found in a checkpoint and decoded."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from qlora.errors import BaseModelError
from qlora.quant.released.settings import QuantizationSettings
from qlora.utils.row_chunks import chunk_rows

ROWS = 128  # decoded at a time at least, and a multiple of it: a multiple of what any format packs together
COMPANIONS = (
    "_scale", "_scale_inv", "_scale_2", "_scales", "_global_scale", "_zero_point", "_shape", "_g_idx", ".scale",
    ".qscale_weight", ".scales", ".qzeros", ".g_idx", ".SCB", ".weight_format",
)  # fmt: skip
# Scales of activations and of the key/value cache, which a 16-bit model does not use.
UNUSED = (
    ".input_scale", ".activation_scale", ".input_global_scale", ".input_zero_point", ".qscale_act", ".k_scale",
    ".v_scale", ".q_scale", ".output_scale", ".weight_format",
)  # fmt: skip
FLOATS, WORDS, EXPONENTS = ("BF16", "F16", "F32"), ("I32",), ("U8", "F8_E8M0")  # as headers name them
Rows = Callable[[slice], Tensor]  # rows of a matrix [O, I], decoded


class StoredFiles(Protocol):
    """The tensors of a checkpoint as they are stored."""

    def __iter__(self) -> Iterator[str]: ...
    def __contains__(self, key: object) -> bool: ...
    def __getitem__(self, key: str) -> Tensor: ...
    def shape(self, key: str) -> tuple[int, ...]:
        """The tensor's shape, from the header."""

    def dtype(self, key: str) -> str:
        """The tensor's dtype, from the header: F8_E4M3."""


def is_companion(key: str) -> bool:
    """Whether a key ends like that of scales and the like, which never hold the codes of a weight."""
    return key.endswith(COMPANIONS)


@dataclass(frozen=True)
class ReleasedTensor(ABC):
    """A matrix [O, I], or a stack of them [E, O, I], stored as codes and scales."""

    kind: ClassVar[str]

    key: str  # as it is read: X.weight
    parts: Mapping[str, str]  # role -> key in the files; "codes" among them
    stack: int | None  # matrices in the stack, one after another in dimension 0; None: a single matrix
    matrix: tuple[int, int]  # O, I

    @classmethod
    @abstractmethod
    def find(cls, key: str, files: StoredFiles, settings: QuantizationSettings) -> "ReleasedTensor | None":
        """The tensor whose codes `key` holds; None if these are not of this format.

        BaseModelError if another part of it is missing, or has a shape that does not fit the codes.
        """

    @abstractmethod
    def rows(self, tensors: Mapping[str, Tensor]) -> Rows:
        """The function that decodes rows of one matrix, from its parts by role.

        BaseModelError for values that no file can have, such as a scale of NaN.
        """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as it is read."""
        return self.matrix if self.stack is None else (self.stack, *self.matrix)

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """One matrix [O, I] in `dtype`, from its parts by role; a few rows at a time."""
        out_features, in_features = self.matrix
        matrix = torch.empty(self.matrix, dtype=dtype)
        decode = self.rows(tensors)
        for part in row_slices(out_features, in_features):
            matrix[part] = decode(part)
        return matrix

    def finite(self, role: str, tensor: Tensor) -> Tensor:
        """`tensor` in float32. BaseModelError unless it is finite."""
        values = tensor.float()
        if not bool(values.isfinite().all()):
            raise BaseModelError(f"{self.parts[role]!r} holds NaN or infinity, expected finite scales.")
        return values


def row_slices(rows: int, width: int) -> Iterator[slice]:
    """The rows that are decoded at a time: so many that their float32 values stay in the CPU's cache."""
    step = max(ROWS, chunk_rows(width, "cpu") // ROWS * ROWS)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def companion(key: str, files: StoredFiles, names: Sequence[str]) -> str:
    """The first of `names` that the files hold. BaseModelError if they hold none: `key` can't be decoded without."""
    stored = next((name for name in names if name in files), None)
    if stored is None:
        raise BaseModelError(f"{key!r} can't be decoded without {' or '.join(names)}, which is missing.")
    return stored


def misfit(key: str, actual: Sequence[int], expected: str) -> BaseModelError:
    """The error for a tensor of a shape that its format excludes."""
    return BaseModelError(f"{key!r} is {list(actual)}, expected {expected}.")


def check_shape(key: str, files: StoredFiles, expected: Sequence[int], reason: str) -> None:
    """BaseModelError unless the stored tensor has the shape `expected`."""
    if files.shape(key) != tuple(expected):
        raise misfit(key, files.shape(key), f"{list(expected)} {reason}")


def check_dtypes(keys: Sequence[str], files: StoredFiles, allowed: Sequence[str]) -> None:
    """BaseModelError unless the stored tensors have dtypes that are allowed."""
    for key in keys:
        if files.dtype(key) not in allowed:
            raise BaseModelError(f"{key!r} is stored as {files.dtype(key)}, expected {' or '.join(allowed)}.")
