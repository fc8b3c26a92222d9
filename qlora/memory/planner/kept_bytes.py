"""Bytes of matrices that stay in 16 bits in a quantized base (`quant.keep`), beyond what they take quantized."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlora.memory.planner.shapes import Matrix, Shapes
from qlora.quant import Keeping, Quantizer


@dataclass(frozen=True)
class KeptBytes:
    """What kept matrices add: by layer, and outside of the layers (with a choice that is not made yet)."""

    layers: Mapping[int, int] = field(default_factory=dict)
    outside: int = 0


def kept_bytes_of(quantizer: Quantizer, shapes: Shapes, dtype_bytes: int) -> KeptBytes:
    """What a quantizer's kept matrices add. RecipeError for a pattern that matches no matrix."""
    if not isinstance(quantizer, Keeping):
        return KeptBytes()
    if quantizer.budget is not None:
        return KeptBytes(outside=_budget_bytes(quantizer, shapes, dtype_bytes))
    quantizer.refuse_unused(path for matrix in shapes.matrices for path in paths_of_copies(matrix))
    layers: dict[int, int] = {}
    outside = 0
    prefix = f"{shapes.layers_path}."
    for matrix in shapes.matrices:
        size = sum(map(quantizer.keeps, paths_of_copies(matrix))) * _added_bytes(quantizer, matrix, dtype_bytes)
        layer = matrix.path.removeprefix(prefix).partition(".")[0]
        if size and matrix.path.startswith(prefix) and layer.isdecimal():
            layers[int(layer)] = layers.get(int(layer), 0) + size
        else:
            outside += size
    return KeptBytes(layers, outside)


def paths_of_copies(matrix: Matrix) -> list[str]:
    """The path of a matrix, or of each expert's."""
    return [f"{matrix.path}.{expert}" for expert in range(matrix.experts)] if matrix.experts else [matrix.path]


def _added_bytes(quantizer: Keeping, matrix: Matrix, dtype_bytes: int) -> int:
    return quantizer.added_bytes(matrix.out_features, matrix.in_features, dtype_bytes)


def _budget_bytes(quantizer: Keeping, shapes: Shapes, dtype_bytes: int) -> int:
    """The largest that the choice can add: its budget, or all matrices."""
    packed = sum(m.copies * quantizer.stored_bytes(m.out_features, m.in_features, dtype_bytes) for m in shapes.matrices)
    added = sum(matrix.copies * _added_bytes(quantizer, matrix, dtype_bytes) for matrix in shapes.matrices)
    return min(quantizer.budget_bytes(packed), added)
