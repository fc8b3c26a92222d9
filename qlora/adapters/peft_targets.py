"""What an adapter_config.json names: target modules, target parameters of experts, and patterns for their ranks.

PEFT 0.21 reads target modules called `up_proj` in models of experts as names of a time when each expert was a module,
and rewrites them to stacks. Layers of such a name that are no experts (a shared expert, a dense first layer) are
therefore target parameters, `mlp.shared_expert.up_proj.weight`, for which PEFT computes the same.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from qlora.adapters.expert_keys import WEIGHT
from qlora.adapters.inject import adapted, adapted_experts
from qlora.adapters.lora import Lora
from qlora.adapters.patterns import by_pattern
from qlora.model.expert_forward import expert_stacks
from qlora.model.module_tree import unit_path
from qlora.model.wrapper_models import tower_modules

REWRITTEN = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
T = TypeVar("T")


def target_names(model: nn.Module) -> list[str]:
    """The shortest names that match exactly the adapted modules: leaf names (servers expect those), else full paths."""
    chosen, stacks = set(adapted(model)) - _rewritten(model), expert_stacks(model)
    leaves = {path.rpartition(".")[2] for path in chosen}
    # PEFT matches names against every module, so a leaf must not occur outside the adapted layers.
    modules = [path for path, _ in model.named_modules() if path not in stacks] + [*tower_modules(model)]
    matched = {path for path in modules if path.rpartition(".")[2] in leaves}
    return sorted(leaves if matched == chosen else chosen)


def target_parameters(model: nn.Module) -> list[str]:
    """The names of the adapted stacks, and of adapted layers that PEFT would rewrite: without the layer's number."""
    return sorted(set(_parameter_names(model).values()))


def pattern_fields(model: nn.Module, adapter: Lora) -> dict[str, Any]:
    """`rank_pattern` and `alpha_pattern` by which PEFT finds the rank and alpha of every target; the user's first."""
    names = _parameter_names(model)
    settings = {
        name: adapter.for_module(name.removesuffix(f".{WEIGHT}"))
        if name.endswith(WEIGHT)
        else adapter.for_experts(name)
        for name in names
    }
    ranks = {path: layer.rank for path, layer in settings.items()}
    alphas = {path: plain_number(layer.alpha) for path, layer in settings.items()}
    alpha_pattern = {key: plain_number(alpha) for key, alpha in adapter.alpha_pattern.items()}
    return {
        "rank_pattern": _completed(adapter.rank_pattern, names, ranks, adapter.rank),
        "alpha_pattern": _completed(alpha_pattern, names, alphas, plain_number(adapter.alpha)),
    }


def short_names(paths: Collection[str], others: Iterable[str]) -> dict[str, str]:
    """Path -> name without the decoder layer's number, if these names match `paths` and none of `others`."""
    names = {path: path.removeprefix(f"{unit_path(path)}.") for path in paths}
    ends = tuple(f".{name}" for name in set(names.values()))
    return {path: path for path in paths} if any(f".{other}".endswith(ends) for other in others) else names


def plain_number(alpha: float) -> float:
    """An int where the value is one: Ollama reads nothing else."""
    return int(alpha) if alpha == int(alpha) else alpha


def _completed(
    patterns: Mapping[str, T], names: Mapping[str, str], values: Mapping[str, T], default: T
) -> dict[str, T]:
    """The patterns, and keys for the parameters (path -> name) whose value they don't give."""
    first, last = dict[str, T](), dict[str, T]()
    for name in dict.fromkeys(names.values()):
        paths = [path for path, other in names.items() if other == name]
        unmatched = [path for path in paths if by_pattern(patterns, path, None) is None]
        wrong = [path for path in paths if by_pattern(patterns, path, default) != values[path]]
        if wrong and set(wrong) <= set(unmatched) and len({values[path] for path in unmatched}) == 1:
            last[name] = values[wrong[0]]
        else:
            first |= {path: values[path] for path in wrong}
    return first | dict(patterns) | last


def _parameter_names(model: nn.Module) -> dict[str, str]:
    """Path of every target parameter -> its name in `target_parameters`, in the model's order."""
    stacks = expert_stacks(model)
    paths = [*adapted_experts(model), *(f"{path}.{WEIGHT}" for path in _rewritten(model))]
    weights = (f"{path}.{WEIGHT}" for path, module in model.named_modules() if path not in stacks)
    return short_names(paths, {*stacks, *weights} - set(paths))


def _rewritten(model: nn.Module) -> set[str]:
    """Adapted layers outside the experts that PEFT would take for experts."""
    if not expert_stacks(model):
        return set()
    return {path for path in adapted(model) if path.rpartition(".")[2] in REWRITTEN}
