"""Initialization of A and B: LoRA's default, gaussian, principal directions of the weight, or the quantization error.

The frozen base is never changed, so all adapters share it and PEFT reads them. With Q the stored matrix, W the original
one, and V the R leading right singular vectors (of W for pissa, of W - Q for loftq):

    pissa   s B A = W V V^T trains, s B0 A0 = Q V V^T is subtracted for good    arXiv:2404.02948, as a LoRA of rank 2 R
    loftq   s B A = (W - Q) V V^T                                               arXiv:2310.08659, its first iteration

Either way the model starts at Q + (W - Q) V V^T: nearer to W than Q is, and at the base where nothing was quantized.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora.adapters.dora import DoraLinear
from qlora.adapters.inject import adapted
from qlora.adapters.lora import LoraLinear
from qlora.errors import AdapterError

ITERATIONS, OVERSAMPLING = 8, 8  # of subspace iteration (Halko et al. 2011, 4.4): rounds, and directions beyond R
MIN_SINGULAR_VALUE = 1e-6  # relative to the largest: with a smaller one A would not learn

# Paths -> (path, original W [O, I]), one at a time.
OriginalWeights = Callable[[set[str]], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True)
class InitResult:
    """|W - Q| over |W|, Frobenius over all adapted matrices: of the stored base, and at the start of training."""

    error_before: float
    error_after: float

    def __str__(self) -> str:
        if not self.error_before:
            return "the base is not quantized further than its files: there is no error to remove"
        removed = 1 - (self.error_after / self.error_before) ** 2
        return (
            f"quantization error {self.error_before:.3%} of the weights' norm, {self.error_after:.3%} at the start of "
            f"training: {removed:.1%} of its energy is removed"
        )


def initialize(model: nn.Module, kind: str, originals: OriginalWeights, seed: int) -> InitResult | None:
    """Initialize A and B of every adapted layer by `kind`; returns the quantization error for pissa and loftq.

    AdapterError if a matrix has fewer directions than the rank, or loftq has no quantization error to start from.
    """
    layers = adapted(model)
    if kind == "gaussian":
        generator = torch.Generator().manual_seed(seed)
        for layer in layers.values():
            _initialize_gaussian(layer, generator)
    if kind not in ("pissa", "loftq"):
        return None
    for path, layer in layers.items():
        _refuse_rank(path, layer, kind)
    seeds = {path: seed + number for number, path in enumerate(layers)}  # files have another order than layers
    sums = torch.zeros(3, dtype=torch.float64)
    for path, weight in originals(set(layers)):
        sums += _initialize_from_weight(layers[path], weight, kind, torch.Generator().manual_seed(seeds[path]))
    norm, before, after = sums.clamp_min(0).sqrt().tolist()
    if kind == "loftq" and not before:
        raise AdapterError(
            "adapter.init: loftq starts from the quantization error, but these files are stored in 4 bits already. "
            "Use the 16-bit checkpoint, or init default."
        )
    return InitResult(before / norm, after / norm)


@torch.no_grad()
def principal_directions(matrix: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """The leading right singular vectors [I, R] of a float32 matrix [O, I], by subspace iteration."""
    width = min(rank + OVERSAMPLING, *matrix.shape)
    basis = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix.t() @ torch.linalg.qr(matrix @ basis).Q).Q
    # The directions are sorted by a small SVD: of the [width, width] factor R of matrix @ basis.
    rotation: Tensor = torch.linalg.svd(torch.linalg.qr(matrix @ basis).R).Vh
    right: Tensor = basis @ rotation[:rank].t()
    return right


@torch.no_grad()
def _initialize_gaussian(layer: LoraLinear, generator: torch.Generator) -> None:
    """A normal with standard deviation 1 / R, as PEFT's `gaussian`; B stays zero."""
    layer.A.copy_(torch.empty(layer.A.shape).normal_(0, 1 / layer.rank, generator=generator))


@torch.no_grad()
def _initialize_from_weight(layer: LoraLinear, weight: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Initialize one layer; returns |W|^2, and |W - Q|^2 before and after, float64."""
    stored = layer.base.weight(torch.float32)
    weight = weight.to(stored.device, torch.float32)
    error = weight - stored
    source = weight if kind == "pissa" else error
    right = principal_directions(source, layer.rank, generator)
    left = source @ right
    values = torch.linalg.vector_norm(left, dim=0)
    root = (values.clamp_min(MIN_SINGULAR_VALUE * float(values.max())).clamp_min(1e-30) / layer.scaling).sqrt()
    layer.A.copy_((right * root).t())
    layer.B.copy_(left / (layer.scaling * root))
    if kind == "pissa":
        layer.A0, layer.B0 = layer.A.detach().clone(), stored @ right / (layer.scaling * root)
    if isinstance(layer, DoraLinear):
        layer.reset_magnitude()
    norm, before, removed = (m.square().sum(dtype=torch.float64).cpu() for m in (weight, error, error @ right))
    return torch.stack([norm, before, before - removed])


def _refuse_rank(path: str, layer: LoraLinear, kind: str) -> None:
    directions = min(layer.base.out_features, layer.base.in_features)
    if layer.rank > directions:
        raise AdapterError(
            f"adapter.rank: {layer.rank} is more than the {directions} directions of {path}, "
            f"which adapter.init {kind} starts from. Use at most {directions}, or init default."
        )
