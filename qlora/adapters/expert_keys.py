"""Expert updates in PEFT's files (`target_parameters`, layout of 0.19.1 and newer), and as one pair for each expert.

PEFT wraps a parameter of an experts module, here `mlp.experts.gate_up_proj` with E matrices [O, I]. In the file

    lora_A.weight [E * R, I]   rows e * R + r: the expert is the slowest index
    lora_B.weight [O, R * E]   columns r * E + e: the expert is the fastest index

belong to the module, `mlp.experts`; where it has two wrapped parameters, the first one has `.base_layer` in its keys.
Everywhere else in qlora an expert's update is a pair A [R, I], B [O, R] under its own path, `...gate_up_proj.3`.
PEFT's name for a matrix of a plain linear layer that is wrapped in this way is `mlp.shared_expert.up_proj.weight`.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.errors import AdapterError
from qlora.quant.expert_stack import STACKS

Pair = tuple[Tensor, Tensor]
NESTED = ".base_layer"
WEIGHT = "weight"  # the parameter of a plain linear layer


def stack_of(config: Mapping[str, Any], path: str) -> str | None:
    """The path of the stack of an expert's matrix, `...gate_up_proj` of `...gate_up_proj.3`; None for others."""
    stack, _, expert = path.rpartition(".")
    return stack if expert.isdecimal() and is_target(config, stack) else None


def is_target(config: Mapping[str, Any], parameter: str) -> bool:
    """Whether `target_parameters` names the parameter, or the end of its path."""
    names = config.get("target_parameters") or ()
    return any(parameter == name or parameter.endswith(f".{name}") for name in names)


def name_in_patterns(config: Mapping[str, Any], path: str) -> str:
    """What rank_pattern and alpha_pattern are matched with for the matrix at `path`."""
    weight = f"{path}.{WEIGHT}"
    return stack_of(config, path) or (weight if is_target(config, weight) else path)


def stack_a(a: Tensor) -> Tensor:
    """PEFT's lora_A [E * R, I] of A [E, R, I]."""
    return a.flatten(0, 1)


def stack_b(b: Tensor) -> Tensor:
    """PEFT's lora_B [O, R * E] of B [E, O, R]."""
    return b.permute(1, 2, 0).flatten(1)


def unstack_a(a: Tensor, experts: int) -> Tensor:
    """A [E, R, I] of PEFT's lora_A [E * R, I]."""
    return a.view(experts, -1, a.shape[-1])


def unstack_b(b: Tensor, experts: int) -> Tensor:
    """B [E, O, R] of PEFT's lora_B [O, R * E]."""
    return b.view(len(b), -1, experts).permute(2, 0, 1)


def keys_of_stacks(stacks: Collection[str]) -> dict[str, str]:
    """Stack path -> what its tensors' names begin with in PEFT's file, for all wrapped stacks of a model."""
    keys: dict[str, str] = {}
    for path in stacks:
        module, _, name = path.rpartition(".")
        later = [other for other in STACKS[STACKS.index(name) + 1 :] if f"{module}.{other}" in stacks]
        keys[path] = module + NESTED * len(later)
    return keys


def join_experts(pairs: Mapping[str, Pair], config: Mapping[str, Any]) -> dict[str, Pair]:
    """The pairs as in PEFT's file: those of the experts of a stack as one, under its name there."""
    stacks: dict[str, dict[int, Pair]] = {}
    joined: dict[str, Pair] = {}
    for path, pair in pairs.items():
        stack = stack_of(config, path)
        if stack is None:
            joined[path] = pair
        else:
            stacks.setdefault(stack, {})[int(path.rpartition(".")[2])] = pair
    for stack, key in keys_of_stacks(stacks).items():
        members = [stacks[stack][expert] for expert in range(len(stacks[stack]))]
        a, b = torch.stack([a for a, _ in members]), torch.stack([b for _, b in members])
        joined[key] = stack_a(a), stack_b(b)
    return joined


def split_experts(pairs: Mapping[str, Pair], config: Mapping[str, Any], ranks: Any, where: Path) -> dict[str, Pair]:
    """The pairs of a file at `where` by path, those of a stack as one pair for each expert: views of the file's.

    ranks: path of a stack -> its rank. AdapterError for tensors that are no stack of that rank, or that
    `target_parameters` does not name.
    """
    split: dict[str, Pair] = {}
    for key, pair in pairs.items():
        module = key.replace(NESTED, "")
        names = _wrapped_parameters(config, module, where)
        if names in ([], [WEIGHT]) and module == key:
            split[key] = pair
            continue
        depth = key.count(NESTED)
        if depth >= len(names) or any(module + NESTED * level not in pairs for level in range(len(names))):
            raise AdapterError(
                f"{where}: {module} has other updates than the {len(names)} that target_parameters names: "
                f"{', '.join(names) or 'none'}."
            )
        stack = f"{module}.{names[-1 - depth]}"
        split |= _experts_of(stack, pair, ranks(stack), where)
    return split


def target_fields(config: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    """`target_modules` and `target_parameters` that name exactly the matrices of an adapter (old path -> new path)."""
    modules, parameters = list[str](), set[str]()
    for old, new in paths.items():
        name = renamed_in_patterns(config, old, new)
        if name == new:
            modules.append(new)
        else:
            parameters.add(name)
    return {"target_modules": sorted(modules)} | ({"target_parameters": sorted(parameters)} if parameters else {})


def renamed_in_patterns(config: Mapping[str, Any], old: str, new: str) -> str:
    """`name_in_patterns` of a matrix whose path was `old`, where the config still names that, and is `new`."""
    if stack_of(config, old):
        return new.rpartition(".")[0]
    return new if name_in_patterns(config, old) == old else f"{new}.{WEIGHT}"


def _experts_of(stack: str, pair: Pair, rank: int, where: Path) -> dict[str, Pair]:
    """Path -> pair of every expert of a stack."""
    a, b = pair
    if a.ndim != 2 or b.ndim != 2 or b.shape[1] != len(a) or len(a) % rank:
        raise AdapterError(
            f"{where}: {stack} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; allowed: [experts * rank, in] "
            f"and [out, rank * experts] with the rank {rank} of adapter_config.json."
        )
    experts = len(a) // rank
    sides = zip(unstack_a(a, experts).unbind(), unstack_b(b, experts).unbind(), strict=True)
    return {f"{stack}.{expert}": pair for expert, pair in enumerate(sides)}


def _wrapped_parameters(config: Mapping[str, Any], module: str, where: Path) -> list[str]:
    """The parameters of a module that `target_parameters` names, in the order in which PEFT wraps them."""
    leaves = {name.rpartition(".")[2] for name in config.get("target_parameters") or ()}
    names = {leaf for leaf in leaves if is_target(config, f"{module}.{leaf}")}
    if not names <= {*STACKS, WEIGHT}:
        unknown = ", ".join(sorted(names - {*STACKS, WEIGHT}))
        raise AdapterError(f"{where}: {module}.{unknown} is not known; allowed: {', '.join(STACKS)} of experts.")
    return [name for name in (*STACKS, WEIGHT) if name in names]
