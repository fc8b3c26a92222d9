"""A training step at true shapes without a byte of memory: fake tensors through transformers' layers and our own.

`Live` counts what is alive, the way an allocator would; nothing here knows the planner's formulas.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from qlora.adapters.lora import LoraLinear
from qlora.base.skeleton import linear_paths
from qlora.quant.fourbit import FourBitLinear, FourBitTensors

CHUNK_BYTES = 256 * 2**20


class Live(TorchDispatchMode):
    """Bytes of storages alive, and their peak since `mark()`."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._seen: Any = weakref.WeakKeyDictionary()
        for each in before:  # a view of what was there before is not new
            self._seen[each.untyped_storage()] = 0

    def mark(self) -> None:
        self.peak = self.live

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for each in tree_iter(out):
            if isinstance(each, Tensor):
                self._add(each.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.live -= size


@dataclass
class Measured:
    """Bytes that a dry run found."""

    static: int  # frozen tensors and adapters
    kept: int  # by one layer for its backward
    loss: int  # peak while the loss and its gradient are computed, beyond static
    backward: int  # peak of the layers' backward, beyond static and gradients


def dry_run(config: Any, dtype: torch.dtype, rows: int, tokens: int, **options: Any) -> Measured:
    """One forward and backward of the model of `config`; options: rank, dropout, recompute (layers), masked."""
    rank, dropout = options.get("rank", 16), options.get("dropout", 0.0)
    masked, recompute = options.get("masked", False), options.get("recompute")
    with FakeTensorMode():
        model = fake_model(config, dtype, rank, dropout)
        step = _Step(model, dtype, rows, tokens, masked)
        return step.measure(config.num_hidden_layers if recompute is None else recompute)


def fake_model(config: Any, dtype: torch.dtype, rank: int, dropout: float) -> Any:
    """The frozen 4-bit model with its adapters, inside a FakeTensorMode."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False)
    for path in linear_paths(model):
        parent, _, leaf = path.rpartition(".")
        linear = model.get_submodule(path)
        shape = (linear.out_features, linear.in_features)
        frozen = FourBitLinear("nf4", 64, shape, _packed(shape), linear.bias)
        setattr(model.get_submodule(parent), leaf, LoraLinear(frozen, rank, 2.0, dropout))
    return model.train()


def _packed(shape: tuple[int, int]) -> FourBitTensors:
    blocks = -(-shape[0] * shape[1] // 64)
    codes = torch.empty(-(-shape[0] * shape[1] // 2), dtype=torch.uint8)
    return FourBitTensors(
        codes, torch.empty(blocks, dtype=torch.uint8), torch.empty(-(-blocks // 256)), torch.empty(1)
    )


class _Step:
    def __init__(self, model: Any, dtype: torch.dtype, rows: int, tokens: int, masked: bool) -> None:
        self.model, self.decoder = model, model.get_decoder()
        self.ids = torch.zeros(rows, tokens, dtype=torch.int64)
        positions = torch.arange(tokens)[None]
        hidden = torch.empty(rows, tokens, model.config.hidden_size, dtype=dtype)
        kinds = (None, "full_attention") if model.config.model_type == "gemma3_text" else (None,)
        self.rotary = self.decoder.rotary_emb(hidden, positions, *kinds[1:])
        if model.config.model_type == "gemma2":  # eager attention adds its mask to the scores
            self.mask: Tensor | None = torch.zeros(rows, 1, tokens, tokens, dtype=dtype)
        else:
            self.mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool) if masked else None
        self.positions = positions

    def measure(self, recompute: int) -> Measured:
        parameters = {id(each.untyped_storage()): each.untyped_storage().nbytes() for each in self.model.parameters()}
        for each in self.model.parameters():
            each.grad = torch.empty_like(each) if each.requires_grad else None
        found = Measured(sum(parameters.values()), self.kept(parameters), 0, 0)
        shared = [self.ids, self.positions, *self.rotary, *([self.mask] if self.mask is not None else [])]
        gradients = [each.grad for each in self.model.parameters() if each.grad is not None]
        with Live([*self.model.parameters(), *self.model.buffers(), *gradients, *shared]) as live:
            hidden = self.hidden(recompute)
            live.mark()
            leaf = hidden.detach().requires_grad_()
            self.loss(leaf).backward()
            found.loss = live.peak
            gradient, hidden_again = leaf.grad, hidden
            del leaf, hidden
            live.mark()
            hidden_again.backward(gradient)
            found.backward = live.peak
        return found

    def kept(self, parameters: dict[int, int]) -> int:
        """Bytes that the second layer saves for backward, tensors made once for all layers left out."""
        shared = [*self.rotary, *([self.mask] if self.mask is not None else [])]
        outside = {id(each.untyped_storage()) for each in shared} | set(parameters)
        saved: dict[int, Any] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if id(storage) not in outside:
                saved[id(storage)] = storage
            return tensor

        entering = self.hidden(0, layers=1).detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            leaving = self.layer(1)(entering)
        del leaving
        return sum(storage.nbytes() for storage in saved.values())

    def hidden(self, recompute: int, layers: int | None = None) -> Tensor:
        embed = self.decoder.embed_in if hasattr(self.decoder, "embed_in") else self.decoder.embed_tokens
        x = embed(self.ids)
        for index in range(len(self.decoder.layers) if layers is None else layers):
            layer = self.layer(index)
            x = checkpoint(layer, x, use_reentrant=False) if index < recompute else layer(x)
        norm = self.decoder.final_layer_norm if hasattr(self.decoder, "final_layer_norm") else self.decoder.norm
        return norm(x) if layers is None else x

    def layer(self, index: int) -> Callable[[Tensor], Tensor]:
        module = self.decoder.layers[index]
        more = {"position_embeddings": self.rotary, "attention_mask": self.mask, "position_ids": self.positions}

        def forward(x: Tensor) -> Tensor:
            out = module(x, **more)
            return out[0] if isinstance(out, tuple) else out

        return forward

    def loss(self, hidden: Tensor) -> Tensor:
        """Every row trained, in chunks as TokenLoss goes."""
        head = self.model.get_output_embeddings()
        flat = hidden.flatten(0, 1) + 0  # the trained rows are gathered
        rows = max(1, CHUNK_BYTES // (4 * head.weight.shape[0]))
        targets = self.ids.flatten()
        total = flat.new_zeros((), dtype=torch.float32)

        def chunk(part: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(head(part).float(), labels, reduction="sum")

        for start in range(0, len(targets), rows):
            total = total + checkpoint(chunk, flat[start : start + rows], targets[start : start + rows], use_reentrant=False)
        return total
