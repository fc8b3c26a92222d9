"""A merged model that is computed when it is read: the reader of tensors that are planned, not written."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from qlora.model.checkpoint_reader import CheckpointReader
from qlora.model.safetensors_writer import PlannedTensor


class PlannedReader(CheckpointReader):
    """Key -> tensor of a plan. The last tensor is kept, since the parts of a stack of experts are read one by one."""

    def __init__(self, folder: Path, tensors: Sequence[PlannedTensor]) -> None:
        self.folder = folder
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, key: str) -> Tensor:
        if self._last is None or self._last[0] != key:
            self._last = None  # before the next one is computed: one at a time
            self._last = (key, self._tensors[key].make())
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._tensors[key].shape

    def size_bytes(self, key: str) -> int:
        """Bytes of the tensor."""
        return self._tensors[key].size_bytes

    def is_float(self, key: str) -> bool:
        """Whether the tensor holds floating point numbers."""
        return self._tensors[key].dtype.is_floating_point

    def part(self, key: str, index: int) -> Tensor:
        """The slice `index` of the tensor's dimension 0."""
        return self[key][index]

    def for_another_thread(self) -> "PlannedReader":
        """A reader of the same plan."""
        return PlannedReader(self.folder, list(self._tensors.values()))
