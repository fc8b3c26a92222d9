"""Grid of scales over a matrix: one for a tensor, a row, a group of columns, or a block, and its values by row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora.quant.released.released_tensor import misfit


@dataclass(frozen=True)
class ScaleGrid:
    """A grid [R, C] of scales for a matrix [O, I]: each is shared by a block of rows and columns, the last may end."""

    shape: tuple[int, int]  # R, C
    block: tuple[int, int]  # rows, columns
    columns: int  # I

    @classmethod
    def fit(
        cls, key: str, scale: Sequence[int], matrix: tuple[int, int], named: Sequence[tuple[int, int]]
    ) -> "ScaleGrid":
        """The grid of scales of shape `scale` (the tensor `key`); `named`: blocks that config.json names.

        BaseModelError if they do not fit the matrix.
        """
        if len(scale) == 4 and scale[1] == scale[3] == 1:  # modelopt's, ready to multiply blocks
            scale = scale[::2]
        rank = 2 - len(scale)
        if rank < 0:
            raise misfit(key, scale, f"scales of a matrix {list(matrix)}")
        grid = (*scale, *[1] * rank)
        for rows, columns in (*named, *_even_blocks(grid, matrix)):
            if grid == (-(-matrix[0] // rows), -(-matrix[1] // columns)):
                return cls((grid[0], grid[1]), (rows, columns), matrix[1])
        blocks = "".join(f", or of blocks {list(block)}" for block in dict.fromkeys(named))
        raise misfit(key, scale, f"scales that divide a matrix {list(matrix)} into equal blocks{blocks}")

    def spread(self, scale: Tensor, part: slice) -> Tensor:
        """The scales [n, I], or [n, 1] where a row has one, of the rows `part`; `scale` holds R * C values."""
        rows = torch.arange(part.start, part.stop) // self.block[0]
        values = scale.reshape(self.shape)[rows]
        if self.shape[1] == 1:
            return values
        return values.repeat_interleave(self.block[1], dim=1)[:, : self.columns]


def _even_blocks(grid: Sequence[int], matrix: tuple[int, int]) -> list[tuple[int, int]]:
    """The block of a grid that divides the matrix evenly, if it does."""
    rows, columns = grid
    even = 0 < rows <= matrix[0] and 0 < columns <= matrix[1] and matrix[0] % rows == 0 and matrix[1] % columns == 0
    return [(matrix[0] // rows, matrix[1] // columns)] if even else []


def one_of_stack(key: str, shape: Sequence[int], stack: int | None) -> tuple[int, ...]:
    """The shape of the scales of one matrix, from that of the tensor `key`: a stack's have its dimension 0.

    A tensor without dimensions is shared by the stack. BaseModelError if it has another number of matrices.
    """
    if stack is None or not shape:
        return tuple(shape)
    if shape[0] != stack:
        raise misfit(key, shape, f"{stack} in dimension 0, one for each matrix of the stack")
    return tuple(shape[1:])
