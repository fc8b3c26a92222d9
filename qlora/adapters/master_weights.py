"""Modules whose own weights train: float32 master weights, cast to the base's dtype wherever they are used.

A trainable copy computes, bit for bit, what the frozen module would with the master weights' values, rounded to the
dtype of its input. No cast copy is kept between forward and backward.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from qlora.errors import AdapterError
from qlora.model.module_tree import decoder_of
from qlora.quant.linear import FrozenLinear
from qlora.utils.rematerialize import Origin, origin_of, rowwise_checkpoint


class MasterMatmul(torch.autograd.Function):
    """x W^T + bias with W and bias trained; saves x, or what it is rematerialized from. Their gradients are float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, origin: Origin | None) -> Tensor:
        """X [..., I], weight [O, I], bias [O] -> [..., O] in x's dtype."""
        ctx.rematerialization = origin.rematerialization if origin else None
        ctx.save_for_backward(weight, *(origin.sources if origin else (x,)))
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias from that of the output [..., O]."""
        (grad,), (weight, *sources) = grads, ctx.saved_tensors
        x = ctx.rematerialization.run(sources) if ctx.rematerialization else sources[0]
        rows, needs_grad = grad.reshape(-1, grad.shape[-1]), ctx.needs_input_grad
        grad_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).float() if needs_grad[1] else None
        grad_bias = rows.sum(0, dtype=torch.float32) if needs_grad[2] else None
        return grad @ weight.to(grad.dtype) if needs_grad[0] else None, grad_weight, grad_bias, None


class MasterLinear(nn.Module):
    """y = x W^T + bias, W [O, I] and bias [O] float32 and trained."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] -> [..., O], both in the base's compute dtype."""
        return MasterMatmul.apply(x, self.weight, self.bias, origin_of(x))  # type: ignore[no-any-return]


class MasterEmbedding(nn.Module):
    """Rows of W [V, I], float32 and trained, in the base's compute dtype."""

    def __init__(self, embedding: nn.Embedding, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.padding_idx, self.dtype = weight, embedding.padding_idx, embedding.weight.dtype
        self.scale = getattr(embedding, "scalar_embed_scale", None)  # Gemma 3 keeps its factor in the embedding

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [...] -> [..., I]."""
        rows = F.embedding(ids, self.weight, self.padding_idx).to(self.dtype)
        return rows if self.scale is None else rows * torch.tensor(self.scale, dtype=self.dtype)


class MasterNorm(nn.Module):
    """A norm over the last dimension, by the base module's forward; its weight and bias are float32 and trained."""

    def __init__(self, norm: nn.Module, weights: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._norm = [norm]  # in a list, so that its own weights are no part of this module
        for name, weight in weights.items():
            self.register_parameter(name, weight)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] -> [..., I]."""
        names = list(self._parameters)

        def norm(rows: Tensor, *weights: Tensor) -> Tensor:
            cast = {name: weight.to(rows.dtype) for name, weight in zip(names, weights, strict=True)}
            return functional_call(self._norm[0], cast, (rows,))  # type: ignore[no-any-return]

        return rowwise_checkpoint(norm, x, trained=tuple(self.parameters()))


def trainable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of all that can train in full, in order: matrices, norms and embedding of the decoder; head."""
    decoder, head = decoder_of(model), model.get_output_embeddings()  # type: ignore[operator]
    inside = {id(module) for module in decoder.modules()} | {id(head)}
    for path, module in model.named_modules():
        if id(module) in inside and _is_trainable(module) and not path.endswith(".base"):
            yield path, module


def trainable_copy(path: str, module: nn.Module, shared: dict[int, nn.Parameter]) -> nn.Module:
    """A trainable replacement of a frozen module. `shared` holds master weights by the id of the frozen parameter,
    so that tied parameters stay tied.

    AdapterError for a matrix that is stored in 4 bits, which can't be trained.
    """
    stored = module.stored() if isinstance(module, FrozenLinear) else {}
    if stored and "dense" not in stored:
        kind = str(module.describe()["kind"])  # type: ignore[operator]
        raise AdapterError(
            f"adapter.save_modules: {path} is stored as {kind}, and 4-bit weights can't be trained. Allowed: "
            "embeddings, norms and the head, which stay in 16 or 32 bit; with quant.kind: dense any linear layer."
        )
    named = {"weight" if name == "dense" else name: value for name, value in module.named_parameters(recurse=False)}
    weights = {name: _master_weight(value, shared) for name, value in named.items()}
    if isinstance(module, nn.Embedding):
        return MasterEmbedding(module, weights["weight"])
    if stored or isinstance(module, nn.Linear):
        return MasterLinear(weights["weight"], weights.get("bias"))
    return MasterNorm(module, weights)


def _master_weight(value: Tensor, shared: dict[int, nn.Parameter]) -> nn.Parameter:
    if id(value) not in shared:
        shared[id(value)] = nn.Parameter(value.detach().to(torch.float32, copy=True))
    return shared[id(value)]


def _is_trainable(module: nn.Module) -> bool:
    if isinstance(module, FrozenLinear | nn.Linear | nn.Embedding):
        return True
    return type(module).__name__.endswith("Norm") and len(list(module.parameters(recurse=False))) > 0
