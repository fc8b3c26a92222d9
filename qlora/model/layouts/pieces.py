"""Pieces: the parts of checkpoint tensors that make up one tensor of the model, and the way back."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from qlora.model.checkpoint_reader import CheckpointReader

Read = Callable[[str], Tensor]  # the model's tensor by name, as it is written


@dataclass(frozen=True)
class Piece:
    """A part of the tensor `key`, in this order: one expert of a stack, transposed, its rows, put in another order."""

    key: str
    expert: int | None = None  # slice of dimension 0; None: the whole tensor
    transposed: bool = False
    rows: tuple[int, int] | None = None  # the first and the one after the last; None: all of them
    interleaved: bool = False  # rows of gate and up alternate in the file, and lie one after the other in the model

    @property
    def is_whole(self) -> bool:
        """Whether the piece is the tensor as it is stored."""
        return self == Piece(self.key)

    def read(self, reader: CheckpointReader) -> Tensor:
        """The piece, in its stored dtype."""
        return self.view(reader[self.key] if self.expert is None else reader.part(self.key, self.expert))

    def shape(self, reader: CheckpointReader) -> tuple[int, ...]:
        """Its shape, without reading data."""
        shape = reader.shape(self.key)[0 if self.expert is None else 1 :]
        return tuple(self.view(torch.empty(shape, device="meta")).shape)

    def view(self, tensor: Tensor) -> Tensor:
        """The piece of a whole tensor, or of one expert's part of it."""
        tensor = tensor.t() if self.transposed else tensor
        if self.rows is not None:
            tensor = tensor[slice(*self.rows)]
        if self.interleaved:
            tensor = torch.cat([tensor[::2], tensor[1::2]])
        return tensor

    def write(self, values: Tensor, tensor: Tensor) -> None:
        """Write the piece's values into the tensor `key` that it was read from."""
        part = tensor if self.expert is None else tensor[self.expert]
        part = part.t() if self.transposed else part
        part = part if self.rows is None else part[slice(*self.rows)]
        if self.interleaved:
            first, second = values.chunk(2)
            part[::2], part[1::2] = first, second
        else:
            part.copy_(values)


@dataclass(frozen=True)
class TensorSource:
    """A tensor of the model: the concatenation of its pieces along dimension 0."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def key(self) -> str:
        """The first checkpoint key, for messages."""
        return self.pieces[0].key

    @property
    def is_whole(self) -> bool:
        """Whether the tensor is stored as it is, under one key."""
        return len(self.pieces) == 1 and self.pieces[0].is_whole

    def read(self, reader: CheckpointReader) -> Tensor:
        """The tensor, in its stored dtype; one that is stored whole is a view of the mapped file."""
        parts = [piece.read(reader) for piece in self.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def shape(self, reader: CheckpointReader) -> tuple[int, ...]:
        """Its shape, without reading data."""
        first, *others = (piece.shape(reader) for piece in self.pieces)
        return (first[0] + sum(other[0] for other in others), *first[1:]) if others else first

    def size_bytes(self, reader: CheckpointReader) -> int:
        """Its bytes, without reading data."""
        return sum(_share(piece, reader) for piece in self.pieces)

    def split(self, values: Tensor, reader: CheckpointReader) -> Iterator[tuple[Piece, Tensor]]:
        """Each piece with its part of the tensor's values."""
        sizes = [piece.shape(reader)[0] for piece in self.pieces] if len(self.pieces) > 1 else [len(values)]
        yield from zip(self.pieces, values.split(sizes), strict=True)


def assemble(key: str, sources: Sequence[TensorSource], read: Read, reader: CheckpointReader) -> Tensor:
    """The checkpoint tensor `key` made of the model's tensors that it holds parts of; `read` computes one of them."""
    tensor = torch.Tensor()
    for source in sources:
        for piece, values in source.split(read(source.name), reader):
            if piece.key == key:
                if not tensor.numel():
                    tensor = torch.empty(reader.shape(key), dtype=values.dtype, device=values.device)
                piece.write(values, tensor)
    return tensor


def _share(piece: Piece, reader: CheckpointReader) -> int:
    whole = reader.size_bytes(piece.key)
    return whole if piece.is_whole else whole * prod(piece.shape(reader)) // max(1, prod(reader.shape(piece.key)))
