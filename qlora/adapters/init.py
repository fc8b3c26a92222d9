"""How A and B start: as LoRA does, gaussian, from the base's principal directions, or from what quantising lost.

The frozen base is never touched, so that all adapters share it and PEFT reads them. With Q the matrix as it is stored,
W as it was before, and V the R leading right singular vectors (of W for pissa, of W - Q for loftq):

    pissa   s B A = W V V^T trains, s B0 A0 = Q V V^T is taken away for good    arXiv:2404.02948, as a LoRA of rank 2 R
    loftq   s B A = (W - Q) V V^T                                               arXiv:2310.08659, its first round

Either way the model starts at Q + (W - Q) V V^T: nearer to W than Q is, and at the base where nothing was quantised.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora.adapters.dora import DoraLinear
from qlora.adapters.inject import adapted
from qlora.adapters.lora import LoraLinear
from qlora.errors import AdapterError

ROUNDS, SPARE = 8, 8  # of subspace iteration (Halko et al. 2011, 4.4), and directions beyond R that it follows
SMALLEST = 1e-6  # of the largest singular value: below it A would not learn

Originals = Callable[[set[str]], Iterable[tuple[str, Tensor]]]  # paths -> each with W [O, I] as it was, one at a time


@dataclass(frozen=True)
class InitResult:
    """|W - Q| over |W|, Frobenius over all adapted matrices, as the base is stored and as training starts."""

    error_before: float
    error_after: float

    def __str__(self) -> str:
        if not self.error_before:
            return "the base is not quantised further than its files: there is no error to remove"
        removed = 1 - (self.error_after / self.error_before) ** 2
        return (
            f"quantisation error {self.error_before:.3%} of the weights' norm, {self.error_after:.3%} as training "
            f"starts: {removed:.1%} of its energy is removed"
        )


def begin(model: nn.Module, kind: str, originals: Originals, seed: int) -> InitResult | None:
    """Set A and B of every adapted layer as `kind` says; what was removed of the quantisation error, where it counts.

    AdapterError if a matrix has fewer directions than the rank, or loftq finds no error to start from.
    """
    layers = adapted(model)
    if kind == "gaussian":
        generator = torch.Generator().manual_seed(seed)
        for layer in layers.values():
            _gaussian(layer, generator)
    if kind not in ("pissa", "loftq"):
        return None
    for path, layer in layers.items():
        _refuse_rank(path, layer, kind)
    seeds = {path: seed + number for number, path in enumerate(layers)}  # files come in another order than layers
    sums = torch.zeros(3, dtype=torch.float64)
    for path, weight in originals(set(layers)):
        sums += _from_weight(layers[path], weight, kind, torch.Generator().manual_seed(seeds[path]))
    norm, before, after = sums.clamp_min(0).sqrt().tolist()
    if kind == "loftq" and not before:
        raise AdapterError(
            "adapter.init: loftq starts from the error of quantising, but these files are stored in 4 bits already. "
            "Take the 16-bit checkpoint, or init default."
        )
    return InitResult(before / norm, after / norm)


@torch.no_grad()
def principal(matrix: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """The leading right singular vectors [I, R] of a float32 matrix [O, I], by subspace iteration."""
    width = min(rank + SPARE, *matrix.shape)
    basis = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(matrix.t() @ torch.linalg.qr(matrix @ basis).Q).Q
    # A small SVD sorts the directions: that of the [width, width] factor of what the matrix makes of them.
    turned: Tensor = torch.linalg.svd(torch.linalg.qr(matrix @ basis).R).Vh
    right: Tensor = basis @ turned[:rank].t()
    return right


@torch.no_grad()
def _gaussian(layer: LoraLinear, generator: torch.Generator) -> None:
    """A normal with deviation 1 / R, as PEFT's `gaussian`; B stays zero."""
    layer.A.copy_(torch.empty(layer.A.shape).normal_(0, 1 / layer.rank, generator=generator))


@torch.no_grad()
def _from_weight(layer: LoraLinear, weight: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Start one layer; |W|^2, and |W - Q|^2 before and after, float64."""
    stored = layer.base.weight(torch.float32)
    weight = weight.to(stored.device, torch.float32)
    error = weight - stored
    source = weight if kind == "pissa" else error
    right = principal(source, layer.rank, generator)
    left = source @ right
    values = torch.linalg.vector_norm(left, dim=0)
    root = (values.clamp_min(SMALLEST * float(values.max())).clamp_min(1e-30) / layer.scaling).sqrt()
    layer.A.copy_((right * root).t())
    layer.B.copy_(left / (layer.scaling * root))
    if kind == "pissa":
        layer.A0, layer.B0 = layer.A.detach().clone(), stored @ right / (layer.scaling * root)
    if isinstance(layer, DoraLinear):
        layer.measure()
    whole, before, gone = (each.square().sum(dtype=torch.float64).cpu() for each in (weight, error, error @ right))
    return torch.stack([whole, before, before - gone])


def _refuse_rank(path: str, layer: LoraLinear, kind: str) -> None:
    directions = min(layer.base.out_features, layer.base.in_features)
    if layer.rank > directions:
        raise AdapterError(
            f"adapter.rank: {layer.rank} is more than the {directions} directions of {path}, "
            f"which adapter.init {kind} starts from. Take at most {directions}, or init default."
        )
