"""What a model's class does before a weight is read: layers to adapt, layers left out, rows, lengths, packing.

The class runs with random weights (model/random_weights.py) through the checks that a run makes at its start.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora.adapters.dora import NO_EXPERTS
from qlora.adapters.expert_targets import FROZEN, refuse_unused_rank, resolve_expert_rank, target_paths
from qlora.adapters.target_modules import select
from qlora.data.prepare import Prepared
from qlora.errors import AdapterError, BaseModelError
from qlora.model.download import find_config
from qlora.model.dtypes import choose_dtype, stored_dtype
from qlora.model.expert_forward import expert_stacks
from qlora.model.layouts.checkpoint_layout import read_layout
from qlora.model.lean_modules import replace_with_lean
from qlora.model.linear_layers import UNUSED, describe_left_out, layers_left_out, linear_paths
from qlora.model.meta_model import build_meta_model, read_config
from qlora.model.open_checkpoint import open_checkpoint
from qlora.model.random_weights import fill_with_random_weights, shortened
from qlora.model.recurrent_mixers import isolate_recurrent_mixers
from qlora.model.rotary import describe_lengths, replace_length_dependent_rotary
from qlora.recipe.matrix_rows import position_limit
from qlora.recipe.recipe import Recipe
from qlora.training.base_check import compare_base
from qlora.training.base_trace import NUMBER
from qlora.training.loss import TokenLoss
from qlora.training.packing_probe import refuse_leaks, refuse_tree_leaks

CPU = torch.device("cpu")
LAYERS = 6  # of a longer model that run: the known hybrids have each kind of layer among them


@dataclass(frozen=True)
class Structure:
    """A model as its class builds it from config.json."""

    trial: Any  # with random weights, and no more than LAYERS layers
    rows: int  # of the embedding
    positions: int | None  # that it has learned; None: no limit
    linears: tuple[str, ...]  # that can be adapted; a stack of experts is one
    stacks: frozenset[str] = frozenset()  # of experts, among them
    left_out: dict[str, str] = field(default_factory=dict)  # linear layers that can't be adapted -> reason
    notes: tuple[str, ...] = ()


def structure_of(recipe: Recipe) -> Structure:
    """The structure of a recipe's base. BaseModelError if it can't be had, or if its class does not run here."""
    folder, attention = find_config(recipe.model.name, recipe.model.revision).parent, recipe.model.attention
    config = read_config(folder)
    model: Any = build_meta_model(config, torch.float32, attention, CPU)
    if any(folder.glob("*.safetensors")):  # a base on the hub need not be downloaded yet
        read_layout(model, open_checkpoint(folder))
    rows, positions = int(model.get_input_embeddings().weight.shape[0]), position_limit(model)
    stored = config.get_text_config().dtype or config.dtype
    dtype = stored_dtype(choose_dtype(recipe.model.dtype, stored, bfloat16=True))
    in_float32 = model._keep_in_fp32_modules_strict and dtype != torch.float32  # which layers, depends on the dtype
    as_trained = build_meta_model(config, dtype, attention, CPU) if in_float32 else model
    paths, left_out = linear_paths(as_trained), layers_left_out(as_trained)
    notes = [describe_left_out(as_trained), describe_lengths(model, recipe.data.max_length)]
    trial, trial_notes = _run_class(config, model, attention)
    unused = {NUMBER.sub("*", path) for path, reason in layers_left_out(trial).items() if reason == UNUSED}
    left_out |= {path: UNUSED for path in paths if NUMBER.sub("*", path) in unused}
    linears = tuple(path for path in target_paths(as_trained, paths) if path not in left_out)
    stacks, lines = frozenset(expert_stacks(as_trained)), tuple(note for note in (*notes, *trial_notes) if note)
    return Structure(trial, rows, positions, linears, stacks, left_out, lines)


def _run_class(config: Any, model: Any, attention: str) -> tuple[Any, Sequence[str]]:
    """A model with random weights that computes what its class does, and notes; of a long one the first layers.

    BaseModelError if the class does not run here.
    """
    short = shortened(config, LAYERS)
    if short is not None:
        with suppress(BaseModelError):  # some classes need all of their layers
            trial = build_meta_model(short, torch.float32, attention, CPU)
            return trial, _compare(trial)
    return model, _compare(model)


def _compare(model: Any) -> Sequence[str]:
    has_full_head = fill_with_random_weights(model)
    replace_with_lean(model)
    replace_length_dependent_rotary(model)
    isolate_recurrent_mixers(model)
    try:
        return compare_base(model).notes
    except BaseModelError as error:
        if has_full_head:
            raise
        return (f"not known before training: {str(error).removeprefix('model: ')}",)


def check_targets(recipe: Recipe, structure: Structure) -> None:
    """AdapterError if `adapter.targets` names nothing that can be adapted, or `adapter.expert_rank` does not fit."""
    adapter = recipe.adapter
    if adapter.kind == "full":
        return
    rank = resolve_expert_rank(adapter.expert_rank, adapter.rank, structure.trial)
    frozen = {} if rank else {path: FROZEN for path in structure.linears if path in structure.stacks}
    candidates = [path for path in structure.linears if path not in frozen]
    chosen = select(candidates, adapter.targets or "all-linear", structure.left_out | frozen)
    stacks = structure.stacks & set(chosen)
    refuse_unused_rank(adapter.expert_rank, len(stacks))
    if stacks and adapter.kind == "dora":
        raise AdapterError(NO_EXPERTS)


def check_packing(prepared: Prepared, structure: Structure) -> None:
    """DataError if packed documents, or answers that share a prefix, attend to each other in this class."""
    loss = TokenLoss(structure.trial)
    refuse_leaks(loss, prepared.train, torch.float32, CPU)
    refuse_tree_leaks(loss, prepared.train, torch.float32, CPU)
