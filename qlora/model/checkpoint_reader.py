"""Contract of a checkpoint's reader: key -> tensor, with what its headers tell before data is read."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


class CheckpointReader(Mapping[str, Tensor]):
    """Key -> tensor of a model folder; a tensor is read on access, on the CPU, and not kept.

    Every method raises BaseModelError, naming file and key, for a damaged file and for a key that it lacks.
    """

    folder: Path

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]:
        """The tensor's shape, without reading its data."""

    @abstractmethod
    def size_bytes(self, key: str) -> int:
        """Bytes of the tensor that is read, without reading its data."""

    @abstractmethod
    def is_float(self, key: str) -> bool:
        """Whether the tensor holds floating point numbers, without reading its data."""

    @abstractmethod
    def part(self, key: str, index: int) -> Tensor:
        """The slice `index` >= 0 of the tensor's dimension 0, read without the rest of the tensor."""

    @abstractmethod
    def for_another_thread(self) -> "CheckpointReader":
        """A reader of the same tensors with file mappings of its own: a mapping must not be shared by threads."""

    def stored_format(self, key: str) -> str | None:
        """Name of the quantized format that the tensor is decoded from; None: it is stored as it is read."""
        return None
