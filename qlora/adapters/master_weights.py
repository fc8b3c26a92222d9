"""Modules whose own weights train: float32 masters, cast to the base's dtype wherever they are used.

A stand-in gives, bit for bit, what the frozen module would with its weights at the masters' values, rounded to the
dtype of its input. Masters keep no cast copy between forward and backward.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from qlora.errors import AdapterError
from qlora.quant.linear import FrozenLinear
from qlora.utils.rematerialize import Origin, origin_of, rowwise_checkpoint


class MasterMatmul(torch.autograd.Function):
    """x W^T + bias with W and bias trained; keeps x, or what it is made again from. Their gradients are float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, origin: Origin | None) -> Tensor:
        """X [..., I], weight [O, I], bias [O] -> [..., O] in x's dtype."""
        ctx.replay = origin.replay if origin else None
        ctx.save_for_backward(weight, *(origin.sources if origin else (x,)))
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias from that of the output [..., O]."""
        (grad,), (weight, *sources) = grads, ctx.saved_tensors
        x = ctx.replay.again(sources) if ctx.replay else sources[0]
        rows, wanted = grad.reshape(-1, grad.shape[-1]), ctx.needs_input_grad
        of_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).float() if wanted[1] else None
        of_bias = rows.sum(0, dtype=torch.float32) if wanted[2] else None
        return grad @ weight.to(grad.dtype) if wanted[0] else None, of_weight, of_bias, None


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
        return rows if self.scale is None else rows * torch.tensor(self.scale, dtype=self.dtype, device=rows.device)


class MasterNorm(nn.Module):
    """A norm over the last dimension by the base's own arithmetic, its weight and bias float32 and trained."""

    def __init__(self, norm: nn.Module, masters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._norm = [norm]  # in a list, so that its own weights are no part of this module
        for name, master in masters.items():
            self.register_parameter(name, master)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] -> [..., I]."""
        names = list(self._parameters)

        def norm(rows: Tensor, *masters: Tensor) -> Tensor:
            cast = {name: master.to(rows.dtype) for name, master in zip(names, masters, strict=True)}
            return functional_call(self._norm[0], cast, (rows,))  # type: ignore[no-any-return]

        return rowwise_checkpoint(norm, x, trained=tuple(self.parameters()))


def trainable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of what can train whole, in order: the decoder's matrices, norms and embedding, and the head."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()  # type: ignore[operator]
    inside = {id(module) for module in decoder.modules()} | {id(head)}
    for path, module in model.named_modules():
        if id(module) in inside and _is_one(module) and not path.endswith(".base"):
            yield path, module


def master_of(path: str, module: nn.Module, shared: dict[int, nn.Parameter]) -> nn.Module:
    """The stand-in of a frozen module; parameters that are one there are one here, `shared` knows them by id.

    AdapterError for a matrix that is stored in 4 bits: these can't move.
    """
    own = module.stored() if isinstance(module, FrozenLinear) else {}
    if own and "dense" not in own:
        kind = str(module.describe()["kind"])  # type: ignore[operator]
        raise AdapterError(
            f"adapter.save_modules: {path} is stored as {kind}, and 4 bits can't be trained. Allowed here: embeddings, "
            "norms and the head, which stay in 16 or 32 bit; with quant.kind: dense any linear layer."
        )
    named = {"weight" if name == "dense" else name: value for name, value in module.named_parameters(recurse=False)}
    masters = {name: _master(value, shared) for name, value in named.items()}
    if isinstance(module, nn.Embedding):
        return MasterEmbedding(module, masters["weight"])
    if own or isinstance(module, nn.Linear):
        return MasterLinear(masters["weight"], masters.get("bias"))
    return MasterNorm(module, masters)


def _master(value: Tensor, shared: dict[int, nn.Parameter]) -> nn.Parameter:
    if id(value) not in shared:
        shared[id(value)] = nn.Parameter(value.detach().to(torch.float32, copy=True))
    return shared[id(value)]


def _is_one(module: nn.Module) -> bool:
    if isinstance(module, FrozenLinear | nn.Linear | nn.Embedding):
        return True
    return type(module).__name__.endswith("Norm") and len(list(module.parameters(recurse=False))) > 0
