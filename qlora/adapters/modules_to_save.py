"""Modules to save (`adapter.save_modules`, PEFT's `modules_to_save`): trained in full, in addition to the updates."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from qlora.adapters.inject import adapted
from qlora.adapters.master_weights import trainable_copy, trainable_modules
from qlora.adapters.target_modules import nearest_names
from qlora.errors import AdapterError
from qlora.model.module_tree import set_by_path


class ModuleToSave(nn.Module):
    """A frozen module and its trained copy, which is used instead; `active = False` switches back to the frozen one."""

    def __init__(self, base: nn.Module, master: nn.Module) -> None:
        super().__init__()
        self.base, self.master, self.active = base, master, True

    @property
    def weight(self) -> Tensor:
        """The weight in use: the loss reads that of the head."""
        return (self.master if self.active else self.base).weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """The forward of the module in use."""
        return (self.master if self.active else self.base)(x)  # type: ignore[no-any-return]


def add_modules_to_save(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Make the modules that `names` match (paths or ends of paths) trainable in full; returns their paths.

    A tied embedding and head stay tied: either name means both. AdapterError for a name that matches no trainable
    module, an adapted layer, or one stored in 4 bits.
    """
    candidates = dict(trainable_modules(model))
    chosen = {path for name in names for path in _matching_paths(candidates, list(adapted(model)), name)}
    shared: dict[int, nn.Parameter] = {}
    chosen |= _tied_pair(model, candidates, chosen)
    paths = [path for path in candidates if path in chosen]
    for path in paths:
        set_by_path(model, path, ModuleToSave(candidates[path], trainable_copy(path, candidates[path], shared)))
    return paths


def modules_to_save(model: nn.Module) -> dict[str, ModuleToSave]:
    """Path -> module to save, in the model's order; includes an embedding and a head with trainable token rows."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ModuleToSave)}


def modules_trained_in_full(model: nn.Module) -> dict[str, ModuleToSave]:
    """Those of them that train every weight of the frozen module."""
    return {path: module for path, module in modules_to_save(model).items() if not hasattr(module.master, "rows")}


def weights_to_save(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Their weights under the base's parameter names; a tied one under both of its names."""
    for path, module in modules_trained_in_full(model).items():
        yield from ((f"{path}.{name}", value) for name, value in module.master.named_parameters())


def names_for_peft(model: nn.Module) -> list[str] | None:
    """The value of PEFT's `modules_to_save`, which matches every module whose path ends so, with or without a dot."""
    chosen = set(modules_trained_in_full(model))
    leaves = {path.rpartition(".")[2] for path in chosen}
    paths = {path.removesuffix(".base") for path, _ in model.named_modules() if not path.endswith(".master")}
    matched = {path for path in paths if path.endswith(tuple(leaves))}
    return sorted(leaves if matched == chosen else chosen) or None


def build_modules_to_save(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[dict[str, ModuleToSave], list[str]]:
    """Modules to save from `tensors` (path.name -> values) in the base's dtype, and the problems if some don't fit."""
    candidates = dict(trainable_modules(model))
    modules: dict[str, ModuleToSave] = {}
    problems: list[str] = []
    for path in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
        if path not in candidates:
            problems.append(f"{path} is not an embedding, norm or head of this base")
            continue
        master = trainable_copy(path, candidates[path], {})
        values = {name: tensors.get(f"{path}.{name}") for name, _ in master.named_parameters()}
        problem = _shape_problem(path, master, values)
        if problem:
            problems.append(problem)
            continue
        for name, value in values.items():
            dtype = next(candidates[path].parameters()).dtype
            setattr(master, name, nn.Parameter(value.to(_device(candidates[path]), dtype), requires_grad=False))  # type: ignore[union-attr]
        modules[path] = ModuleToSave(candidates[path], master)
    return modules, problems


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _shape_problem(path: str, master: nn.Module, values: Mapping[str, Tensor | None]) -> str | None:
    """Why the tensors of one module can't be its weights, or None."""
    for name, weight in master.named_parameters():
        value = values[name]
        if value is None:
            return f"{path}.{name} is missing"
        if value.shape != weight.shape or not value.is_floating_point() or not torch.isfinite(value).all():
            return f"{path}.{name} is {list(value.shape)} of {value.dtype}, needed: {list(weight.shape)} finite numbers"
    return None


def _tied_pair(model: nn.Module, candidates: Mapping[str, nn.Module], chosen: set[str]) -> set[str]:
    """The paths of embedding and head, if one of them is chosen and they are tied."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    pair = {path for path, module in candidates.items() if any(module is end for end in ends)}
    return pair if pair & chosen and ends[1] is not None and ends[0].weight is ends[1].weight else set()


def _matching_paths(candidates: Mapping[str, nn.Module], adapted_paths: list[str], name: str) -> list[str]:
    paths = [path for path in candidates if path == name or path.endswith(f".{name}")]
    if paths:
        return paths
    if any(path == name or path.endswith(f".{name}") for path in adapted_paths):
        raise AdapterError(
            f"adapter.save_modules: {name!r} is adapted by adapter.targets already. Remove it from one of the two."
        )
    hint, leaves = nearest_names(name, candidates)
    raise AdapterError(
        f"adapter.save_modules: {name!r} matches no module that can train in full.{hint} Allowed: "
        f"{leaves}, or the end of a path such as layers.0.input_layernorm."
    )
