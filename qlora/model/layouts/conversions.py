"""Conversions: what each chain of transformers' conversion operations does to a checkpoint key, as pieces.

transformers converts whole tensors in memory (core_model_loading.py); a piece says the same of one expert or one range
of rows, so that no stack is ever built. One line a chain; a chain that is not listed is refused by name.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.model.layouts.pieces import Piece


@dataclass(frozen=True)
class ConvertedKey:
    """A checkpoint key that one of transformers' converters takes."""

    key: str
    renamed: str  # after transformers' renamings, before the converter
    name: str  # of the model's tensor: the converter's first target
    pattern: str  # the converter's source pattern that matched
    converter: Any
    shape: tuple[int, ...]  # in the file

    @property
    def expert(self) -> int:
        """The expert's number in the key."""
        match = re.search(self.pattern.replace("*", r"(\d+)", 1), self.renamed)
        return int(match.group(1)) if match else -1


@dataclass(frozen=True)
class PlacedPiece:
    """A piece, and which of how many pieces of the tensor `name` it is. A stack's pieces are those of its experts."""

    name: str
    piece: Piece
    position: int = 0
    count: int = 1


SizesOf = Callable[[str], Sequence[int]]  # name of a parameter -> its sizes as transformers' class holds it


def placed_pieces(converted: ConvertedKey, sizes_of: SizesOf) -> Iterator[PlacedPiece]:
    """The pieces of a converted key. KeyError for a chain of operations that CONVERSIONS does not have."""
    operations = converted.converter.operations
    chain = tuple(f"{type(operation).__name__}{getattr(operation, 'dim', '')}" for operation in operations)
    return CONVERSIONS[chain](converted, sizes_of)


def _expert(converted: ConvertedKey, _: SizesOf) -> Iterator[PlacedPiece]:
    """`experts.3.down_proj.weight` -> one expert of a stack, or rows of it."""
    patterns = converted.converter.source_patterns
    position = patterns.index(converted.pattern)
    name = f"{converted.name}.{converted.expert}.weight"
    yield PlacedPiece(name, Piece(converted.key), position, len(patterns))


def _rows_of_stack(converted: ConvertedKey, sizes_of: SizesOf) -> Iterator[PlacedPiece]:
    """`gate_proj [E, I, H]` and `up_proj [E, I, H]` -> `gate_up_proj [E, 2I, H]`."""
    patterns = converted.converter.source_patterns
    position = patterns.index(converted.pattern)
    for expert in range(sizes_of(converted.name)[0]):
        piece = Piece(converted.key, expert)
        yield PlacedPiece(f"{converted.name}.{expert}.weight", piece, position, len(patterns))


def _concatenated(converted: ConvertedKey, _: SizesOf) -> Iterator[PlacedPiece]:
    """`q_conv1d`, `k_conv1d`, `v_conv1d` -> `conv1d`."""
    patterns = converted.converter.source_patterns
    position, count = patterns.index(converted.pattern), len(patterns)
    if "*" in converted.pattern:  # shards with numbers
        match = re.search(converted.pattern.replace("*", r"(\d+)", 1), converted.renamed)
        position, count = int(match.group(1)) if match else 0, 0
    yield PlacedPiece(converted.name, Piece(converted.key), position, count)


def _rows(converted: ConvertedKey, sizes_of: SizesOf) -> Iterator[PlacedPiece]:
    """`query_key_value` -> `q_proj`, `k_proj` and `v_proj`, one after the other."""
    targets, start = converted.converter.target_patterns, 0
    for target in targets:
        name = converted.name.replace(targets[0], target)
        end = start + sizes_of(name)[0]
        yield PlacedPiece(name, Piece(converted.key, rows=(start, end)))
        start = end


def _transposed_stack(converted: ConvertedKey, sizes_of: SizesOf) -> Iterator[PlacedPiece]:
    """A stack whose matrices are stored transposed, unless the file has them as the class does."""
    sizes = tuple(sizes_of(converted.name))
    checks = converted.converter.operations[0].check_dims and converted.shape == sizes
    for expert in range(sizes[0]):
        yield PlacedPiece(f"{converted.name}.{expert}.weight", Piece(converted.key, expert, transposed=not checks))


def _interleaved_stack(converted: ConvertedKey, sizes_of: SizesOf) -> Iterator[PlacedPiece]:
    """A stack in whose matrices rows of gate and up alternate."""
    for expert in range(sizes_of(converted.name)[0]):
        yield PlacedPiece(f"{converted.name}.{expert}.weight", Piece(converted.key, expert, interleaved=True))


CONVERSIONS: dict[tuple[str, ...], Callable[[ConvertedKey, SizesOf], Iterator[PlacedPiece]]] = {
    ("MergeModulelist0",): _expert,  # down_proj, w2, fc2 of each expert
    ("MergeModulelist0", "Concatenate1"): _expert,  # gate and up, w1 and w3
    ("Concatenate1",): _rows_of_stack,  # step3p7
    ("Concatenate0",): _concatenated,  # olmo_hybrid, kimi_linear
    ("Chunk0",): _rows,  # hrm_text
    ("Split0",): _rows,  # sarvam_moe
    ("Transpose",): _transposed_stack,  # qwen3_vl_moe
    ("Interleave1",): _interleaved_stack,  # inkling
}
