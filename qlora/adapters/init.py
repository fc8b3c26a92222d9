"""Initialization of A and B: LoRA's default, gaussian, principal directions of the weight, or the quantization error.

The frozen base is never changed, so all adapters share it and PEFT reads them. With Q the stored matrix, W the original
one, and V the R leading right singular vectors (of W for pissa, of W - Q for loftq):

    pissa   s B A = W V V^T trains, s B0 A0 = Q V V^T is subtracted for good    arXiv:2404.02948, as a LoRA of rank 2 R
    loftq   s B A = (W - Q) V V^T                                               arXiv:2310.08659, its first iteration

Either way the model starts at Q + (W - Q) V V^T: nearer to W than Q is, and at the base where nothing was quantized.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qlora.adapters.dora import DoraLinear
from qlora.adapters.expert_lora import ExpertLora
from qlora.adapters.inject import adapted, adapted_experts
from qlora.adapters.lora import LoraLinear
from qlora.errors import AdapterError
from qlora.quant.linear import FrozenLinear

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
    layers: dict[str, LoraLinear | ExpertLora] = {**adapted(model), **adapted_experts(model)}
    if kind == "gaussian":
        generator = torch.Generator().manual_seed(seed)
        for layer in layers.values():
            _initialize_gaussian(layer, generator)
    return _start_from_weights(layers, kind, originals, seed) if kind in ("pissa", "loftq") else None


def _start_from_weights(
    layers: Mapping[str, LoraLinear | ExpertLora], kind: str, originals: OriginalWeights, seed: int
) -> InitResult:
    """Initialize A and B by the original weights; returns the quantization error."""
    matrices = _matrices(layers, keeps_start=kind == "pissa")
    for path, matrix in matrices.items():
        _refuse_rank(path, matrix, kind)
    seeds = {path: seed + number for number, path in enumerate(matrices)}  # files have another order than layers
    sums = torch.zeros(3, dtype=torch.float64)
    for path, weight in originals(set(matrices)):
        sums += _initialize_from_weight(matrices[path], weight, kind, torch.Generator().manual_seed(seeds[path]))
    for layer in layers.values():
        if isinstance(layer, DoraLinear):
            layer.reset_magnitude()
    norm, before, after = sums.clamp_min(0).sqrt().tolist()
    if kind == "loftq" and not before:
        raise AdapterError(
            "adapter.init: loftq starts from the quantization error, but these files are stored in 4 bits already. "
            "Use the 16-bit checkpoint, or init default."
        )
    return InitResult(before / norm, after / norm)


class _Matrix(NamedTuple):
    """One frozen matrix and the memory of its update; a0 and b0 where the update keeps its start."""

    base: FrozenLinear
    scaling: float
    a: Tensor  # [R, I]
    b: Tensor  # [O, R]
    a0: Tensor | None
    b0: Tensor | None


def _matrices(layers: Mapping[str, LoraLinear | ExpertLora], keeps_start: bool) -> dict[str, _Matrix]:
    """Path -> matrix, each expert of a stack under its own."""
    matrices: dict[str, _Matrix] = {}
    for path, layer in layers.items():
        a, b = layer.A.detach(), layer.B.detach()
        if keeps_start:
            layer.A0, layer.B0 = torch.zeros_like(a), torch.zeros_like(b)
        a0, b0 = layer.A0, layer.B0
        if isinstance(layer, LoraLinear):
            matrices[path] = _Matrix(layer.base, layer.scaling, a, b, a0, b0)
            continue
        for e, frozen in enumerate(layer.base):
            assert isinstance(frozen, FrozenLinear)
            start = (None, None) if a0 is None or b0 is None else (a0[e], b0[e])
            matrices[f"{path}.{e}"] = _Matrix(frozen, layer.scaling, a[e], b[e], *start)
    return matrices


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
def _initialize_gaussian(layer: LoraLinear | ExpertLora, generator: torch.Generator) -> None:
    """A normal with standard deviation 1 / R, as PEFT's `gaussian`; B stays zero."""
    layer.A.copy_(torch.empty(layer.A.shape).normal_(0, 1 / layer.rank, generator=generator))


@torch.no_grad()
def _initialize_from_weight(matrix: _Matrix, weight: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Initialize one matrix's update; returns |W|^2, and |W - Q|^2 before and after, float64."""
    stored, scaling = matrix.base.weight(torch.float32), matrix.scaling
    weight = weight.to(stored.device, torch.float32)
    error = weight - stored
    source = weight if kind == "pissa" else error
    right = principal_directions(source, len(matrix.a), generator)
    left = source @ right
    values = torch.linalg.vector_norm(left, dim=0)
    if not values.any():  # loftq on a matrix that stays in 16 bits: there is no error, and LoRA's start is kept
        return torch.stack([weight.square().sum(dtype=torch.float64).cpu(), *torch.zeros(2, dtype=torch.float64)])
    root = (values.clamp_min(MIN_SINGULAR_VALUE * float(values.max())).clamp_min(1e-30) / scaling).sqrt()
    matrix.a.copy_((right * root).t())
    matrix.b.copy_(left / (scaling * root))
    if matrix.a0 is not None and matrix.b0 is not None:
        matrix.a0.copy_(matrix.a)
        matrix.b0.copy_(stored @ right / (scaling * root))
    norm, before, removed = (m.square().sum(dtype=torch.float64).cpu() for m in (weight, error, error @ right))
    return torch.stack([norm, before, before - removed])


def _refuse_rank(path: str, matrix: _Matrix, kind: str) -> None:
    directions, rank = min(matrix.base.out_features, matrix.base.in_features), len(matrix.a)
    if rank > directions:
        raise AdapterError(
            f"adapter.rank: {rank} is more than the {directions} directions of {path}, "
            f"which adapter.init {kind} starts from. Use at most {directions}, or init default."
        )
