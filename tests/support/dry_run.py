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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from qlora.adapters.lora import LoraLinear
from qlora.model.attention import NAME, documents_of
from qlora.model.lean_modules import swap
from qlora.model.lm_head import Head
from qlora.model.meta_model import linear_paths
from qlora.quant.fourbit import FourBitLinear, FourBitTensors
from qlora.training.loss import FrozenHeadLoss


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
    """One forward and backward of the model of `config`; options: rank, recompute (layers), documents a row."""
    with FakeTensorMode():
        model = fake_model(config, dtype, options.get("rank", 16))
        step = _Step(model, dtype, rows, tokens, options.get("documents", 1))
        return step.measure(options.get("recompute", config.num_hidden_layers))


def fake_model(config: Any, dtype: torch.dtype, rank: int) -> Any:
    """The frozen 4-bit model with its adapters, inside a FakeTensorMode; attention as base/skeleton.py sets it."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.set_attn_implementation(NAME if model._supports_sdpa else "eager")
    model.requires_grad_(False)
    for path in linear_paths(model):
        parent, _, leaf = path.rpartition(".")
        linear = model.get_submodule(path)
        shape = (linear.out_features, linear.in_features)
        frozen = FourBitLinear("nf4", 64, shape, _packed(shape), linear.bias)
        setattr(model.get_submodule(parent), leaf, LoraLinear(frozen, rank, 2.0, 0.0))
    swap(model, lambda module, stand_in: True)  # that they agree is proved where there are numbers
    return model.train()


def _packed(shape: tuple[int, int]) -> FourBitTensors:
    blocks = -(-shape[0] * shape[1] // 64)
    codes = torch.empty(-(-shape[0] * shape[1] // 2), dtype=torch.uint8)
    return FourBitTensors(codes, torch.empty(blocks, dtype=torch.uint8), torch.empty(-(-blocks // 256)), torch.empty(1))


class _Step:
    """The model layer by layer, so that no mask is built from values, which fake tensors do not have."""

    def __init__(self, model: Any, dtype: torch.dtype, rows: int, tokens: int, documents: int) -> None:
        self.model, self.decoder = model, model.get_decoder()
        self.ids = torch.zeros(rows, tokens, dtype=torch.int64)
        self.positions = torch.arange(tokens)[None]
        hidden = torch.empty(rows, tokens, model.config.hidden_size, dtype=dtype)
        kinds = ("full_attention",) if model.config.model_type == "gemma3_text" else ()
        self.rotary = self.decoder.rotary_emb(hidden, self.positions, *kinds)
        eager = model.config._attn_implementation == "eager"  # adds its mask to the scores
        self.mask = torch.zeros(rows, 1, tokens, tokens, dtype=dtype) if eager else None
        starts = tuple(range(0, tokens, tokens // documents))
        self.documents = documents_of((starts,) * rows, tokens, hidden.device) if documents > 1 else None

    def measure(self, recompute: int) -> Measured:
        """Sizes of what stands, of what one layer keeps, and both peaks."""
        parameters = {id(each.untyped_storage()): each.untyped_storage().nbytes() for each in self.model.parameters()}
        for each in self.model.parameters():
            each.grad = torch.empty_like(each) if each.requires_grad else None
        found = Measured(sum(parameters.values()), self.kept(set(parameters)), 0, 0)
        gradients = [each.grad for each in self.model.parameters() if each.grad is not None]
        with Live([*self.model.parameters(), *self.model.buffers(), *gradients, self.ids, *self.shared()]) as live:
            loss = self.loss(self.hidden(recompute))
            found.loss = live.peak
            live.mark()
            loss.backward()
            found.backward = live.peak
        return found

    def shared(self) -> list[Tensor]:
        """What is made once for all layers."""
        return [self.positions, *self.rotary, *([self.mask] if self.mask is not None else [])]

    def kept(self, parameters: set[int]) -> int:
        """Bytes that a layer saves for backward, its own input included."""
        outside = {id(each.untyped_storage()) for each in self.shared()} | parameters
        saved: dict[int, Any] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if id(storage) not in outside:
                saved[id(storage)] = storage
            return tensor

        entering = self.embedded().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            leaving = self.layer(1)(entering)
        del leaving
        return sum(storage.nbytes() for storage in saved.values())

    def embedded(self) -> Tensor:
        """The input of the first layer."""
        return self.model.get_input_embeddings()(self.ids)

    def hidden(self, recompute: int) -> Tensor:
        """The last hidden states, normed."""
        x = self.embedded()
        for index in range(len(self.decoder.layers)):
            layer = self.layer(index)
            x = checkpoint(layer, x, use_reentrant=False) if index < recompute else layer(x)
        return self.decoder.final_layer_norm(x) if hasattr(self.decoder, "final_layer_norm") else self.decoder.norm(x)

    def layer(self, index: int) -> Callable[[Tensor], Tensor]:
        """A decoder layer as a function of its input."""
        more = {"position_embeddings": self.rotary, "attention_mask": self.mask, "position_ids": self.positions}
        more |= {"documents": self.documents} if self.documents else {}

        def forward(x: Tensor) -> Tensor:
            out = self.decoder.layers[index](x, **more)
            return out[0] if isinstance(out, tuple) else out

        return forward

    def loss(self, hidden: Tensor) -> Tensor:
        """Every token trained."""
        rows = hidden.flatten(0, 1) + 0  # as trained rows are gathered
        return FrozenHeadLoss.apply(rows, self.ids.flatten(), Head(self.model))
