"""Random weights of almost no size for a model on `meta`: its class runs before a checkpoint is read.

A linear layer is the product of two thin matrices. Every other large tensor is a view into one vector, in which rows
overlap; of a large head only the first rows exist. Shapes, buffers, modules and attention are the real ones.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.model.buffers import UNSET
from qlora.model.linear_layers import linear_paths
from qlora.model.module_tree import set_by_path
from qlora.quant.linear import FrozenLinear

RANK = 4  # of a linear layer
LARGE = 2**20  # values; a smaller tensor is drawn in full
HEAD_VALUES, HEAD_ROWS = 2**24, 1024  # a larger head has this many rows
OFFSETS = 2**16  # first values of the vector at which views start


class _Product(torch.autograd.Function):
    """L (R x) + bias as a function of its own, as in quant/linear.py: some classes do not take its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "LowRankLinear") -> Tensor:
        """X [..., I] -> [..., O]."""
        ctx.layer = layer
        return F.linear(F.linear(x, layer.right), layer.left, layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The gradient of x [..., I]."""
        return grads[0] @ ctx.layer.left @ ctx.layer.right, None


class LowRankLinear(FrozenLinear):
    """y = L (R x) + bias with L [O, R] and R [R, I]."""

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
        super().__init__(left.shape[0], right.shape[1], bias)
        self.left, self.right = (nn.Parameter(factor, requires_grad=False) for factor in (left, right))

    def weight(self, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
        """L R [O, I]."""
        return (self.left @ self.right).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] -> [..., O], without the product L R."""
        return _Product.apply(x, self)  # type: ignore[no-any-return]

    def describe(self) -> dict[str, Any]:
        """Its shape."""
        return {"kind": "random", "out_features": self.out_features, "in_features": self.in_features}


class _Source:
    """Random tensors of any shape."""

    def __init__(self, longest: int) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._vector = self.normal(longest + OFFSETS)
        self._views = 0

    def normal(self, *shape: int) -> Tensor:
        """Independent values."""
        return torch.randn(shape, generator=self._generator)

    def view(self, *shape: int, scale: float) -> Tensor:
        """Overlapping rows: the value at i, j, ... is that of a vector at i + j + ..."""
        self._views += 1
        start = self._views * 7919 % OFFSETS
        return (self._vector[start : start + sum(shape)] * scale).as_strided(shape, (1,) * len(shape))

    def parameter(self, name: str, shape: torch.Size) -> Tensor:
        """Values that suit a parameter: near 1 for a scale, small for a bias, of variance 1 / I for a matrix [O, I]."""
        if len(shape) < 2:
            return self.normal(*shape) * 0.1 + (0.0 if name.endswith("bias") else 1.0)
        scale = shape[-1] ** -0.5
        return self.normal(*shape) * scale if shape.numel() <= LARGE else self.view(*shape, scale=scale)


@torch.no_grad()
def fill_with_random_weights(model: Any) -> bool:
    """Give every parameter on `meta`, and every buffer without values, random ones; False if the head was cut.

    The linear layers that would be quantized become `LowRankLinear`.
    """
    source = _Source(max(sum(value.shape) for value in model.parameters()))
    for path in linear_paths(model):
        set_by_path(model, path, _low_rank(model.get_submodule(path), source))
    is_cut = _cut(model.get_output_embeddings(), source)
    if is_cut:
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    drawn: dict[int, nn.Parameter] = {}  # a tied parameter has several names
    for name, value in list(model.named_parameters(remove_duplicate=False)):
        if value.is_meta:
            if id(value) not in drawn:
                drawn[id(value)] = nn.Parameter(source.parameter(name, value.shape), requires_grad=False)
            set_by_path(model, name, drawn[id(value)])
    for buffer in model.buffers():
        if getattr(buffer, UNSET, False):
            buffer.fill_(0.5 if buffer.is_floating_point() else 0)
    return not is_cut


def shortened(config: Any, layers: int) -> Any | None:
    """The configuration of a model with the first `layers` layers; None if it has no more, or does not allow it."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    count = getattr(text, "num_hidden_layers", None)
    if not isinstance(count, int) or count <= layers:
        return None
    try:
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == count:  # a setting of each layer
                setattr(text, name, value[:layers])
        text.num_hidden_layers = layers
    except Exception:  # a configuration can raise anything at a change
        return None
    return short


def _low_rank(linear: Any, source: _Source) -> LowRankLinear:
    left = source.view(linear.out_features, RANK, scale=RANK**-0.5)
    right = source.view(RANK, linear.in_features, scale=linear.in_features**-0.5)
    bias = None if linear.bias is None else source.parameter("bias", linear.bias.shape)
    return LowRankLinear(left, right, bias)


def _cut(head: Any, source: _Source) -> bool:
    """Give a large head its first rows only; whether it is large."""
    if head.weight.numel() <= HEAD_VALUES:
        return False
    for name, value in list(head.named_parameters(recurse=False)):
        values = source.parameter(name, torch.Size((HEAD_ROWS, *value.shape[1:])))
        setattr(head, name, nn.Parameter(values, requires_grad=False))
    return True
