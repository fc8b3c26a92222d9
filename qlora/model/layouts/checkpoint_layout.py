"""Layout of a checkpoint: the source of every tensor of a model, and the tensors that every key holds parts of.

Names come from transformers' own conversion mapping, which its classes are loaded by; conversions.py says what its
operations do.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qlora.errors import BaseModelError
from qlora.model.buffers import persistent_buffers
from qlora.model.checkpoint_reader import CheckpointReader
from qlora.model.expert_forward import expert_stacks
from qlora.model.layouts.conversions import ConvertedKey, PlacedPiece, placed_pieces
from qlora.model.layouts.pieces import Piece, TensorSource


@dataclass(frozen=True)
class CheckpointLayout:
    """Where the tensors of a model lie in a checkpoint. A tied head that is stored as well is left out."""

    sources: Mapping[str, TensorSource]  # by the name of the model's parameter or buffer, in the order of the files
    ignored: tuple[str, ...]  # keys that match no tensor of the model

    @cached_property
    def by_key(self) -> dict[str, list[TensorSource]]:
        """Key -> the model's tensors that it holds, or holds parts of."""
        sources: dict[str, list[TensorSource]] = defaultdict(list)
        for source in self.sources.values():
            for key in dict.fromkeys(piece.key for piece in source.pieces):
                sources[key].append(source)
        return dict(sources)


def read_layout(model: Any, reader: CheckpointReader, left_out: Iterable[str] = ()) -> CheckpointLayout:
    """The layout of a checkpoint for a model on `meta`; `left_out`: keys that belong to others, such as scales.

    BaseModelError, naming the key, for a layout that can't be read, a missing part of a matrix, and an expert too many.
    """
    others = set(left_out)
    namer = KeyNamer(model, reader)
    placed = {key: namer.pieces(key) for key in reader if key not in others}
    placed = _tied(model, placed)
    known = {*dict(model.named_parameters(remove_duplicate=False)), *persistent_buffers(model)}
    pieces: dict[str, dict[int, PlacedPiece]] = defaultdict(dict)
    ignored: list[str] = []
    for key, parts in placed.items():
        used = [part for part in parts if part.name in known]
        if parts and not used:
            _refuse_unknown_expert(reader, key, parts[0], namer.stacks)
            ignored.append(key)
        for part in used:
            pieces[part.name][part.position] = part
    sources = {name: TensorSource(name, _in_order(reader.folder, parts)) for name, parts in pieces.items()}
    return CheckpointLayout(sources, tuple(ignored))


class KeyNamer:
    """Checkpoint keys -> pieces of a model's tensors."""

    def __init__(self, model: Any, reader: CheckpointReader) -> None:
        transforms = get_model_conversion_mapping(model)
        self.stacks = {path: (len(stack), stack) for path, stack in expert_stacks(model).items()}
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._prefix, self._reader = model.base_model_prefix, reader
        self._parameters = _class_parameters(model)

    def pieces(self, key: str) -> list[PlacedPiece]:
        """The pieces of the model's tensors that `key` holds. BaseModelError for a layout that can't be read."""
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self._parameters)
        if pattern is None:
            return self._own_pieces(key, name)
        renamed, _ = rename_source_key(key, self._renamings, [])
        converter = next(other for other in self._converters if other.rename_source_key(renamed)[1] == pattern)
        shape = self._reader.shape(key)
        converted = ConvertedKey(key, renamed, name, pattern, converter, shape)
        try:
            return list(placed_pieces(converted, lambda target: self._parameters[target].shape))
        except KeyError as error:
            problem = f"{key!r} is stored in a layout that can't be read yet ({error.args[0]})"
            raise BaseModelError(f"model: {self._reader.folder}: {problem}. Choose another base.") from None

    def _own_pieces(self, key: str, name: str) -> list[PlacedPiece]:
        """The pieces of a key that is stored as transformers' class holds it."""
        if name in self.stacks:
            count, stack = self.stacks[name]
            return [
                PlacedPiece(f"{name}.{expert}.weight", Piece(key, expert, stack.transposed)) for expert in range(count)
            ]
        path = name.removesuffix("_bias")
        if path in self.stacks:
            return [PlacedPiece(f"{path}.{expert}.bias", Piece(key, expert)) for expert in range(self.stacks[path][0])]
        return [PlacedPiece(name, Piece(key))]


def _class_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor as transformers' class holds it: a stack of experts is one parameter, and so are its biases."""
    parameters = dict(model.state_dict())
    for path, stack in expert_stacks(model).items():
        layers: list[Any] = list(stack)
        first = layers[0]
        sizes = (first.in_features, first.out_features) if stack.transposed else (first.out_features, first.in_features)
        parameters[path] = torch.empty(len(layers), *sizes, device="meta")
        if first.bias is not None:
            parameters[f"{path}_bias"] = torch.empty(len(layers), first.out_features, device="meta")
    return parameters


def _tied(model: Any, placed: Mapping[str, list[PlacedPiece]]) -> dict[str, list[PlacedPiece]]:
    """Without a tied head that is stored as well; one that is stored alone is the embedding it is tied to."""
    tied: dict[str, str] = dict(model.all_tied_weights_keys)
    stored = {part.name for parts in placed.values() for part in parts}
    kept: dict[str, list[PlacedPiece]] = {}
    for key, parts in placed.items():
        source = tied.get(parts[0].name) if parts else None
        if source is None:
            kept[key] = parts
        elif source not in stored:
            kept[key] = [PlacedPiece(source, parts[0].piece)]
            stored.add(source)
    return kept


def _in_order(folder: Path, parts: Mapping[int, PlacedPiece]) -> tuple[Piece, ...]:
    """The pieces of a tensor in their order. BaseModelError if one is missing."""
    first = next(iter(parts.values()))
    count = first.count or len(parts)
    missing = sorted(set(range(count)) - parts.keys())
    if missing:
        raise BaseModelError(
            f"model: {folder}: of {first.name!r} only {first.piece.key!r} is there: part {missing[0] + 1} of {count} "
            "is missing. Fetch the folder again."
        )
    return tuple(parts[position].piece for position in sorted(parts))


def _refuse_unknown_expert(
    reader: CheckpointReader, key: str, part: PlacedPiece, stacks: Mapping[str, tuple[int, Any]]
) -> None:
    path, _, _ = part.name.rpartition(".")
    stack = path.rpartition(".")[0]
    if stack in stacks:
        raise BaseModelError(f"model: {reader.folder}: found {key!r}, but config.json has {stacks[stack][0]} experts.")
