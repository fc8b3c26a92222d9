"""Measures what quantizing a matrix does: a frozen layer on disk that computes with W, with its stored form, or both.

With E = (W - Q) x the output error of one matrix and g the gradient of log p(y) at its output, for tokens y drawn from
the model itself, the loss of information of quantizing this matrix alone is to second order

    KL = 1/2 E_y [(sum_t g_t E_t)^2]

the Fisher information in the direction of the error (Amari 1998; as diagonal in SqueezeLLM, arXiv:2306.07629). It is
summed over the tokens of a document before it is squared, since errors of several tokens reach the same logits.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora.model.lazy_model import OnDiskLinear
from qlora.model.module_tree import set_by_path
from qlora.quant import Quantizer
from qlora.quant.linear import FrozenLinear

ERROR_VALUES = 2**22  # of an output error that are computed in float32 at a time


@dataclass
class MatrixSums:
    """Sums over tokens: squares of error and output, and the squared inner products with the gradient."""

    error: float = 0.0
    output: float = 0.0
    loss: float = 0.0  # of (sum_t g_t E_t)^2 over documents and draws
    tokens: int = 0


@dataclass
class MeasuredBase:
    """A base whose matrices stay on disk; `mode` says what they compute with, for all of them at once."""

    model: nn.Module
    quantizer: Quantizer
    dtype: torch.dtype  # in which a run quantizes matrices, and keeps others
    mode: Literal["original", "stored", "measured"] = "original"
    kept: frozenset[str] = frozenset()  # matrices that the mode `stored` leaves in 16 bits
    documents: Tensor | None = None  # [T]: the document of each token of the sequence that is measured
    sums: dict[str, MatrixSums] = field(default_factory=dict)
    measured_tokens: list[int] = field(default_factory=list)  # of each pass

    @classmethod
    def of(cls, model: nn.Module, quantizer: Quantizer, dtype: torch.dtype) -> "MeasuredBase":
        """A lazy model, every matrix of which is measured."""
        base = cls(model, quantizer, dtype)
        layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, OnDiskLinear)]
        for path, layer in layers:
            base.sums[path] = MatrixSums()
            set_by_path(model, path, MeasuredLinear(path, layer, base))
        return base


class MeasuredLinear(FrozenLinear):
    """y = x W^T + bias; W is read from disk on each use."""

    def __init__(self, path: str, source: OnDiskLinear, base: MeasuredBase) -> None:
        super().__init__(source.out_features, source.in_features)
        self.bias, self.path = source.bias, path
        self._source, self._base = source, [base]  # in a list: the model is no submodule of its layer

    @property
    def base(self) -> MeasuredBase:
        """The measurement that this matrix belongs to."""
        return self._base[0]

    def weight(self, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
        """W [O, I], or what is left of it when it is stored."""
        weight = self.original()
        if self.base.mode == "stored" and self.path not in self.base.kept:
            weight = self.base.quantizer.quantize(weight).weight(self.base.dtype)
        return weight.to(dtype)

    def original(self) -> Tensor:
        """W [O, I] in the dtype in which a run has it."""
        return self._source.weight(self.base.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Compute y [..., O] of x [..., I]."""
        if self.base.mode != "measured":
            return super().forward(x)
        return _Measured.apply(x, self)  # type: ignore[no-any-return]


class _Measured(torch.autograd.Function):
    """x W^T + bias with the original W; backward measures what quantization would change."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: MeasuredLinear) -> Tensor:
        """Compute y [..., O]; x is saved."""
        ctx.layer = layer
        ctx.save_for_backward(x)
        return F.linear(x, layer.weight(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The gradient of x; adds to the layer's sums."""
        (grad,), (x,) = grads, ctx.saved_tensors
        layer: MeasuredLinear = ctx.layer
        weight = layer.original()
        _add_sums(layer, weight, x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]))
        return grad @ weight.to(grad.dtype), None


def _add_sums(layer: MeasuredLinear, weight: Tensor, x: Tensor, grad: Tensor) -> None:
    """Add the errors of the tokens x [N, I], with gradients [N, O], a few tokens at a time."""
    sums, documents = layer.base.sums[layer.path], layer.base.documents
    error = weight.float() - layer.base.quantizer.quantize(weight).weight(torch.float32)
    products = []
    for rows in torch.arange(len(x), device=x.device).split(max(1, ERROR_VALUES // max(weight.shape))):
        part = F.linear(x[rows].float(), error)
        sums.error += float(part.square().sum(dtype=torch.float64))
        sums.output += float(F.linear(x[rows], weight.to(x.dtype)).float().square().sum(dtype=torch.float64))
        products.append((part * grad[rows].float()).sum(-1))
    sums.tokens += len(x)
    product = torch.cat(products)
    if documents is not None and len(documents) == len(x):  # experts see some tokens, in another order
        product = product.new_zeros(int(documents[-1]) + 1).index_add_(0, documents, product)
    sums.loss += float(product.square().sum(dtype=torch.float64))
