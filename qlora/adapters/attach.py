"""An adapter file's layers put on a model, after checking that the file fits the model's base."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapters.dora import DoraLinear
from qlora.adapters.expert_lora import ExpertLora
from qlora.adapters.lora import LoraLinear
from qlora.adapters.modules_to_save import build_modules_to_save
from qlora.adapters.peft_config import MAX_RANK, has_layer_filter, module_settings, possible_ranks
from qlora.adapters.peft_files import AdapterFile
from qlora.adapters.plain_lora import refuse_changed_base
from qlora.adapters.trainable_tokens import build_token_rows
from qlora.errors import AdapterError
from qlora.model.expert_forward import expert_stacks
from qlora.model.linear_layers import frozen_linears
from qlora.model.module_tree import set_by_path
from qlora.quant.expert_stack import ExpertStack


def attach(model: nn.Module, file: AdapterFile, base_sha256: str, allow_other_base: bool = False) -> str | None:
    """Put an adapter file's layers on `model`; returns a line to show when its base can't be checked.

    AdapterError if it was trained on other weights, or one of its tensors matches no module or has another shape.
    """
    layers, note = build_layers(model, file, base_sha256, allow_other_base)
    for path, layer in layers.items():
        set_by_path(model, path, layer)
    return note


def build_layers(
    model: nn.Module, file: AdapterFile, base_sha256: str, allow_other_base: bool = False
) -> tuple[dict[str, nn.Module], str | None]:
    """`attach` without a change to `model`: the layers by path, each around the model's own frozen matrices."""
    note = check_base(file, base_sha256, allow_other_base)
    refuse_changed_base(file)
    frozen, stacks = frozen_linears(model), expert_stacks(model)
    modules, module_problems = build_modules_to_save(model, file.modules)
    rows, row_problems = build_token_rows(model, file.config, file.rows)
    problems = (
        _pair_problems(file, frozen)
        + _stack_problems(file, stacks)
        + module_problems
        + row_problems
        + _missing_modules(file, model)
    )
    if problems:
        listed = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise AdapterError(f"{file.folder}: does not fit this base: {listed}. Use the base it was trained on.")
    layers: dict[str, nn.Module] = {**modules, **rows}
    for path, stack in stacks.items():
        if f"{path}.0" in file.pairs:
            layers[path] = _expert_layer(file, path, stack)
    for path, (a, b) in file.pairs.items():
        if path.rpartition(".")[0] in stacks:
            continue
        kind = DoraLinear if path in file.magnitudes else LoraLinear
        scaling = module_settings(file.config, path, a.shape[0]).scaling
        layers[path] = layer = kind(frozen[path], a.shape[0], scaling, 0.0)
        layer.load_pair(a, b)
        if isinstance(layer, DoraLinear):
            layer.magnitude.data.copy_(file.magnitudes[path])
    return layers, note


def _expert_layer(file: AdapterFile, path: str, stack: ExpertStack) -> ExpertLora:
    """A stack of experts with its updates of the file."""
    pairs = [file.pairs[f"{path}.{expert}"] for expert in range(len(stack))]
    rank = pairs[0][0].shape[0]
    layer = ExpertLora(stack, rank, module_settings(file.config, f"{path}.0", rank).scaling, 0.0)
    layer.load_pair(torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs]))
    return layer


def check_base(file: AdapterFile, base_sha256: str, allow_other_base: bool) -> str | None:
    """A line to show when the base of a file can't be checked. AdapterError if it was trained on other weights."""
    if file.base_sha256 is None:
        return f"{file.folder} carries no fingerprint of its base: that it belongs to this one can't be checked."
    if file.base_sha256 != base_sha256 and not allow_other_base:
        name = file.config.get("base_model_name_or_path")
        raise AdapterError(
            f"{file.folder}: was trained on other weights (base {name!r}, sha256 {file.base_sha256[:12]}...; "
            f"this base is {base_sha256[:12]}...). Load the base it was trained on."
        )
    return None


def _pair_problems(file: AdapterFile, frozen: Mapping[str, Any]) -> list[str]:
    """Why the file's A, B and magnitudes can't be those of the frozen layers, one line per problem."""
    problems = [problem for path in file.pairs if (problem := _pair_problem(file, path, frozen))]
    others = [*file.embeddings, *file.base_weights]
    problems += [f"{path} holds LoRA on an embedding, which was not read as a whole weight" for path in others]
    problems += [problem for path, m in file.magnitudes.items() if (problem := _magnitude_problem(path, m, frozen))]
    return problems + [f"{path} is named by target_modules, but the file lacks it" for path in _missing(file, frozen)]


def _stack_problems(file: AdapterFile, stacks: Mapping[str, ExpertStack]) -> list[str]:
    """Stacks of which the file has the updates of some experts only, or updates of several ranks."""
    problems = []
    for path, stack in stacks.items():
        pairs = [file.pairs.get(f"{path}.{expert}") for expert in range(len(stack))]
        ranks = sorted({len(pair[0]) for pair in pairs if pair is not None and pair[0].ndim})
        if ranks and None in pairs:
            number = len(stack) - pairs.count(None)
            problems.append(f"{path} has updates of {number} experts, the base has {len(stack)}")
        elif len(ranks) > 1:
            problems.append(f"{path} has experts of the ranks {ranks}, needed: one rank")
    return problems


def _pair_problem(file: AdapterFile, path: str, frozen: Mapping[str, Any]) -> str | None:
    a, b = file.pairs[path]
    if path not in frozen:
        if ".experts." in path and any(".experts." in other for other in frozen):  # as transformers 4 named them
            return f"{path} is an expert alone, here a part of a stack: load the adapter in PEFT 0.19, save it again"
        return f"{path} is not a linear layer of this base"
    layer = frozen[path]
    if not (a.is_floating_point() and b.is_floating_point()):
        return f"{path} is stored as {a.dtype}, needed: floating-point numbers"
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not 1 <= a.shape[0] <= MAX_RANK:
        return f"{path} has A {list(a.shape)} and B {list(b.shape)}"
    ranks = possible_ranks(file.config, path)
    if ranks and a.shape[0] not in ranks:
        return f"{path} has rank {a.shape[0]}, its config says {' or '.join(map(str, sorted(ranks)))}"
    if (b.shape[0], a.shape[1]) != (layer.out_features, layer.in_features):
        shape = [layer.out_features, layer.in_features]
        return f"{path} has an update of shape {[b.shape[0], a.shape[1]]}, the base's matrix is {shape}"
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return f"{path} has values that are not finite"
    return None


def _magnitude_problem(path: str, magnitude: Tensor, frozen: Mapping[str, Any]) -> str | None:
    rows = frozen[path].out_features if path in frozen else len(magnitude)
    if magnitude.shape != (rows,) or not magnitude.is_floating_point() or not torch.isfinite(magnitude).all():
        return f"{path} has a magnitude {list(magnitude.shape)} of {magnitude.dtype}, needed: {rows} finite numbers"
    return None


def _missing(file: AdapterFile, frozen: Mapping[str, Any]) -> list[str]:
    """Layers of the base that `target_modules` names, but the file does not hold."""
    names = file.config.get("target_modules")
    if has_layer_filter(file.config) or not isinstance(names, list):
        return []
    named = [path for path in frozen if any(path == name or path.endswith(f".{name}") for name in names)]
    return [path for path in named if path not in file.pairs]


def _missing_modules(file: AdapterFile, model: nn.Module) -> list[str]:
    """Modules to save and trainable tokens that the config names, but the file does not hold.

    A name that no module of the model has is not missing: PEFT does nothing for it.
    """
    paths = [key.rpartition(".")[0] for key in file.modules]
    modules = [path for path, _ in model.named_modules()]
    names = [name for name in file.config.get("modules_to_save") or [] if any(path.endswith(name) for path in modules)]
    missing = [
        f"{name} is named by modules_to_save" for name in names if not any(path.endswith(name) for path in paths)
    ]
    if file.config.get("trainable_token_indices") and not file.rows:
        missing.append("rows are named by trainable_token_indices")
    return [f"{problem}, but the file lacks it" for problem in missing]
