"""Modules that keep less for backward than transformers' own, put in their place where they give the same numbers.

A frozen norm keeps its input in the base's dtype, not float32 copies of it; a gated MLP keeps gate and up, not their
product: half of what transformers and PEFT keep, for some arithmetic on rows that is made again.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qlora.utils.rematerialize import rowwise_checkpoint

PROOF_ROWS = 3  # of random numbers, on which a module and its lean stand-in must agree in every bit


class LeanNorm(nn.Module):
    """A frozen norm over the last dimension: the original's own arithmetic, made again in backward."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        # One dictionary of parameters for both: whoever moves or shards them here does so there.
        self._parameters = norm._parameters
        self._original = [norm]  # in a list, so that it is no second module of the model

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] -> [..., I]."""
        norm = self._original[0]
        trains = any(each is not None and each.requires_grad for each in self._parameters.values())
        return norm(x) if trains else rowwise_checkpoint(norm.forward, x)  # type: ignore[no-any-return]


class LeanGatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)), of which gate(x) and up(x) are kept."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] -> [..., I]."""
        return self.down_proj(rowwise_checkpoint(self.product, self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return]

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        """act(gate) * up."""
        return self.act_fn(gate) * up  # type: ignore[no-any-return]


class LeanFusedMlp(LeanGatedMlp):
    """The same with gate and up as the two halves of one matrix."""

    gate_up_proj: nn.Module
    activation_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] -> [..., I]."""
        return self.down_proj(rowwise_checkpoint(self.product_of_halves, self.gate_up_proj(x)))  # type: ignore[no-any-return]

    def product_of_halves(self, both: Tensor) -> Tensor:
        """act(first half) * second half."""
        gate, up = both.chunk(2, dim=-1)
        return up * self.activation_fn(gate)  # type: ignore[no-any-return]


class LeanPlainMlp(LeanGatedMlp):
    """down(act(up(x))), of which up(x) is kept."""

    dense_h_to_4h: nn.Module
    dense_4h_to_h: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] -> [..., I]."""
        return self.dense_4h_to_h(rowwise_checkpoint(self.act, self.dense_h_to_4h(x)))  # type: ignore[no-any-return]


MLPS: dict[frozenset[str], Callable[[nn.Module], nn.Module]] = {
    frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"}): LeanGatedMlp,
    frozenset({"gate_up_proj", "down_proj", "activation_fn"}): LeanFusedMlp,
    frozenset({"dense_h_to_4h", "dense_4h_to_h", "act"}): LeanPlainMlp,
}


def lean(model: nn.Module, agreeing: dict[type, bool] | None = None) -> int:
    """Swap norms and MLPs of a filled, frozen model for lean ones; one that doesn't agree in every bit stays.

    Returns how many were swapped. Numbers don't change: forward and backward run the very operations of the original.
    `agreeing`: the proofs so far, one for each class, where a model comes in parts.
    """
    agreeing = {} if agreeing is None else agreeing

    def agree(module: nn.Module, stand_in: nn.Module) -> bool:
        if type(module) not in agreeing:
            agreeing[type(module)] = _agree(module, stand_in)
        return agreeing[type(module)]

    return swap(model, agree)


def swap(model: nn.Module, agree: Callable[[nn.Module, nn.Module], bool]) -> int:
    """Swap every norm and MLP whose stand-in `agree` accepts; returns how many."""
    found = [(path, module, stand_in_of(module)) for path, module in model.named_modules()]
    swapped = 0
    for path, module, stand_in in found:
        if stand_in is None or not agree(module, stand_in):
            continue
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, stand_in.train(module.training))
        swapped += 1
    return swapped


def stand_in_of(module: nn.Module) -> nn.Module | None:
    """The lean module of the same parameters, for a norm or an MLP of a known build that is not lean yet."""
    if type(module) in (LeanNorm, LeanGatedMlp, LeanFusedMlp, LeanPlainMlp):
        return None
    children = frozenset(name for name, _ in module.named_children())
    if children in MLPS:
        return MLPS[children](module)
    is_norm = type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and not children
    return LeanNorm(module) if is_norm and len(list(module.parameters(recurse=False))) > 0 else None


@torch.no_grad()
def _agree(module: nn.Module, stand_in: nn.Module) -> bool:
    """Whether both give the same bits for random rows, all at once and one by one; False if one can't take them."""
    first = next(module.parameters())
    floats = [each.dtype for each in module.parameters() if each.is_floating_point()]
    width = first.shape[-1] if isinstance(stand_in, LeanNorm) else _input_width(module)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, PROOF_ROWS, width, generator=generator).to(first.device, floats[0] if floats else torch.float32)
    try:
        whole, lean_whole = module(x), stand_in(x)
        alone = torch.cat([stand_in(row) for row in x.split(1, dim=1)], dim=1)
    except (RuntimeError, TypeError, AttributeError):
        return False
    return torch.equal(whole, lean_whole) and (isinstance(stand_in, LeanGatedMlp) or torch.equal(whole, alone))


def _input_width(mlp: nn.Module) -> int:
    """Features that the first matrix of an MLP takes."""
    return int(next(child for child in mlp.children() if hasattr(child, "in_features")).in_features)  # type: ignore[arg-type]
