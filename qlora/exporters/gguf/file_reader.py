"""A GGUF file as a checkpoint under transformers' names: dequantized, its layout undone."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from qlora.errors import QloraError
from qlora.exporters.gguf.gguf_file import GgufFile
from qlora.exporters.gguf.metadata import ROPE_FREQS
from qlora.exporters.gguf.tensor_layout import Placement
from qlora.model.checkpoint_reader import CheckpointReader


class GgufReader(CheckpointReader):
    """The model's tensors, float32. QloraError if the file lacks one, or has one that is not the model's."""

    def __init__(self, file: GgufFile, places: Sequence[Placement]) -> None:
        self.folder, self._file, self._places = file.path.parent, file, places
        self._parts: dict[str, list[tuple[Placement, int | None]]] = defaultdict(list)
        for place in places:
            if place.name not in file.tensors:
                raise QloraError(f"{file.path}: the tensor {place.name} is missing. Export it again.")
            for number, source in enumerate(place.sources):
                self._parts[source].append((place, number if place.is_stack else None))
        unknown = sorted(file.tensors.keys() - {place.name for place in places} - {ROPE_FREQS})
        if unknown:
            raise QloraError(f"{file.path}: the tensor {unknown[0]} has no place in this model.")

    def __getitem__(self, key: str) -> Tensor:
        parts = [place.undo(self._file.values(place.name, number)) for place, number in self._parts[key]]
        return parts[0] if len(parts) == 1 else self._parts[key][0][0].join(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def shape(self, key: str) -> tuple[int, ...]:
        """The tensor's shape."""
        shapes = [self._file.shape(place.name)[0 if number is None else 1 :] for place, number in self._parts[key]]
        first, *_ = shapes
        return (sum(shape[0] for shape in shapes), *first[1:])

    def size_bytes(self, key: str) -> int:
        """Bytes of the tensor as it is read."""
        return prod(self.shape(key)) * torch.float32.itemsize

    def is_float(self, key: str) -> bool:
        """Whether the tensor holds floating point numbers: always."""
        return True

    def part(self, key: str, index: int) -> Tensor:
        """The slice `index` of the tensor's dimension 0."""
        return self[key][index]

    def for_another_thread(self) -> "GgufReader":
        """A reader of the same file with a mapping of its own."""
        return GgufReader(GgufFile(self._file.path), self._places)
