"""Which expert matrices can be adapted, and the rank of their updates (`adapter.expert_rank`)."""

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from qlora.errors import AdapterError
from qlora.model.expert_forward import expert_stacks
from qlora.model.linear_layers import frozen_linears

# The experts that a token visits, under the names of transformers' configurations.
VISITS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
FROZEN = "adapter.expert_rank: 0 leaves the experts frozen"


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> frozen matrix, or the stack of a layer's experts, in the model's order; without their wrappers."""
    stacks, modules = expert_stacks(model), dict[str, nn.Module]()
    for path, layer in frozen_linears(model).items():
        owner = path.rpartition(".")[0]
        modules |= {owner: stacks[owner]} if owner in stacks else {path: layer}
    return modules


def target_paths(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Paths of matrices with one path, that of the stack, in place of those of its experts."""
    stacks = expert_stacks(model)
    owners = ((path, path.rpartition(".")[0]) for path in paths)
    return list(dict.fromkeys(owner if owner in stacks else path for path, owner in owners))


def resolve_expert_rank(setting: Literal["auto"] | int, rank: int, model: Any) -> int:
    """The rank of each expert's update: `auto` is the adapter's rank over the experts that a token visits, at least 1.

    0 for a model without experts. AdapterError for a number there, which would have no effect.
    """
    if not expert_stacks(model):
        if setting != "auto":
            raise AdapterError(
                f"adapter.expert_rank: {setting} has no effect: {type(model).__name__} has no experts. Remove it."
            )
        return 0
    return max(1, rank // experts_per_token(model.config)) if setting == "auto" else setting


def refuse_unused_rank(setting: Literal["auto"] | int, stacks: int) -> None:
    """AdapterError for a rank of experts where none of their `stacks` is adapted."""
    if setting not in ("auto", 0) and not stacks:
        raise AdapterError(
            f"adapter.expert_rank: {setting} has no effect: adapter.targets names no experts. Remove it, or add "
            "gate_up_proj and down_proj (all-linear includes them)."
        )


def experts_per_token(config: Any) -> int:
    """How many routed experts a token visits. AdapterError if the configuration does not say so."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in VISITS:
        value = getattr(text, name, None)
        number = max(value) if isinstance(value, list) and value else value
        if isinstance(number, int) and number > 0:
            return number
    raise AdapterError(
        f"adapter.expert_rank: config.json of {type(config).__name__} does not say how many experts a token visits "
        f"({', '.join(VISITS)}). Set adapter.expert_rank to a number, or to 0: experts stay frozen."
    )
