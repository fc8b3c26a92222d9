"""Reader that decodes released quantized formats: a matrix under its 16-bit key in place of its codes and scales."""

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from qlora.errors import BaseModelError
from qlora.model.checkpoint_reader import CheckpointReader
from qlora.model.safetensors_reader import SafetensorsReader
from qlora.quant.released.released_tensor import UNUSED, ReleasedTensor

Result = TypeVar("Result")


class DecodedReader(CheckpointReader):
    """Key -> tensor: decoded to `dtype` on access, matrix by matrix, or as it is stored."""

    def __init__(self, files: SafetensorsReader, tensors: Mapping[str, ReleasedTensor], dtype: torch.dtype) -> None:
        self.files, self.tensors, self.dtype, self.folder = files, tensors, dtype, files.folder
        stored = {key for tensor in tensors.values() for key in tensor.parts.values()}
        unused = {key for key in files if key.endswith(UNUSED)}
        self.hidden = tuple(sorted((stored | unused) - tensors.keys()))
        self._keys = self._in_order_of_files()

    def _in_order_of_files(self) -> dict[str, None]:
        """The keys file by file, so that each file is read once; a decoded one where its codes are."""
        hidden, decoded = set(self.hidden), {tensor.parts["codes"]: key for key, tensor in self.tensors.items()}
        keys = (decoded.get(key, key) for key in self.files)
        return dict.fromkeys(key for key in keys if key not in hidden)

    def __getitem__(self, key: str) -> Tensor:
        """The tensor `key`, on the CPU. BaseModelError for a damaged file and for scales that no file can have."""
        tensor = self.tensors.get(key)
        if tensor is None:
            return self.files[self._visible(key)]
        if tensor.stack is None:
            return self._decode(tensor, {role: self.files[part] for role, part in tensor.parts.items()})
        stack = torch.empty(tensor.shape, dtype=self.dtype)
        for index in range(tensor.stack):
            stack[index] = self.part(key, index)
        return stack

    def part(self, key: str, index: int) -> Tensor:
        """The slice `index` >= 0 of dimension 0; of a stack only this matrix is read and decoded."""
        tensor = self.tensors.get(key)
        if tensor is None:
            return self.files.part(self._visible(key), index)
        if not 0 <= index < tensor.shape[0]:
            raise BaseModelError(f"model: {self._file(tensor)}: {key!r} has {tensor.shape[0]} parts, no part {index}.")
        if tensor.stack is None:
            return self[key][index]
        return self._decode(tensor, {role: self._of_stack(part, index) for role, part in tensor.parts.items()})

    def _of_stack(self, key: str, index: int) -> Tensor:
        """The part of one matrix, of a tensor that a stack shares or that has its dimension 0."""
        return self.files.part(key, index) if self.files.shape(key) else self.files[key]

    def _decode(self, tensor: ReleasedTensor, parts: Mapping[str, Tensor]) -> Tensor:
        return self._located(tensor, lambda: tensor.dequantize(parts, self.dtype))

    def _located(self, tensor: ReleasedTensor, decode: Callable[[], Result]) -> Result:
        try:
            return decode()
        except BaseModelError as error:
            raise BaseModelError(f"model: {self._file(tensor)}: {error} Fetch the file again.") from error

    def _file(self, tensor: ReleasedTensor) -> str:
        return str(self.folder / self.files.files[tensor.parts["codes"]])

    def _visible(self, key: str) -> str:
        """`key`. KeyError if there is no such tensor, or if it is a part of a decoded one."""
        if key not in self._keys:
            raise KeyError(key)
        return key

    def for_another_thread(self) -> "DecodedReader":
        """A reader of the same tensors with file mappings of its own."""
        return DecodedReader(self.files.for_another_thread(), self.tensors, self.dtype)

    def __iter__(self) -> Iterator[str]:
        """Keys file by file."""
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of the tensor that is read."""
        tensor = self.tensors.get(key)
        return self.files.shape(self._visible(key)) if tensor is None else tensor.shape

    def size_bytes(self, key: str) -> int:
        """Bytes of the tensor that is read: decoded ones take more than in the file."""
        tensor = self.tensors.get(key)
        if tensor is None:
            return self.files.size_bytes(self._visible(key))
        return torch.Size(tensor.shape).numel() * self.dtype.itemsize

    def is_float(self, key: str) -> bool:
        """Whether the tensor that is read holds floating point numbers."""
        return key in self.tensors or self.files.is_float(self._visible(key))

    def stored_format(self, key: str) -> str | None:
        """Name of the quantized format that the tensor is decoded from."""
        tensor = self.tensors.get(key)
        return tensor.kind if tensor else None
