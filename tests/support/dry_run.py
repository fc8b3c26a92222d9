"""A training step at true shapes without memory: fake tensors through transformers' layers and this package's.

`LiveBytes` counts storages as an allocator would; nothing here uses the planner's formulas.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from qlora.adapters.lora import LoraLinear
from qlora.model.attention import DOCUMENT_ATTENTION, documents_of
from qlora.model.kernels.rms_norm import NormForm, rms_norm
from qlora.model.lean_modules import LeanNorm, replace_modules
from qlora.model.linear_layers import linear_paths
from qlora.model.lm_head import Head
from qlora.quant.fourbit_linear import FourBitLinear, FourBitTensors
from qlora.training.loss import FrozenHeadLoss
from support import varlen_memory


class LiveBytes(TorchDispatchMode):
    """Bytes of live storages, and their peak since `reset_peak()`."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._seen: Any = weakref.WeakKeyDictionary()
        for tensor in existing:  # views of them are not new
            self._seen[tensor.untyped_storage()] = 0

    def reset_peak(self) -> None:
        self.peak = self.live

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
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
    """Bytes measured in a dry run."""

    static: int  # frozen tensors and adapters
    kept: int  # saved by one layer for its backward
    loss: int  # peak while the loss and its gradient are computed, without static
    backward: int  # peak of the layers' backward, without static and gradients


def dry_run(config: Any, dtype: torch.dtype, sequences: int, tokens: int, **options: Any) -> Measured:
    """One forward and backward of the model of `config`.

    Options: rank, recompute (layers), documents per sequence; gpu: as on a GPU, on `meta`, for which torch's own
    kernels, chunk sizes and the variable-length attention kernel are taken.
    """
    gpu = options.get("gpu", False)
    with torch.device("meta") if gpu else FakeTensorMode():
        model = fake_model(config, dtype, options.get("rank", 16), varlen_memory.NAME if gpu else DOCUMENT_ATTENTION)
        step = _Step(model, dtype, sequences, tokens, options.get("documents", 1))
        return step.measure(options.get("recompute", config.num_hidden_layers))


def fake_model(config: Any, dtype: torch.dtype, rank: int, attention: str) -> Any:
    """The frozen 4-bit model with its adapters, without memory; attention as set by model/meta_model.py."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.set_attn_implementation(attention if model._supports_sdpa else "eager")
    model.requires_grad_(False)
    for path in linear_paths(model):
        parent, _, leaf = path.rpartition(".")
        linear = model.get_submodule(path)
        shape = (linear.out_features, linear.in_features)
        frozen = FourBitLinear("nf4", 64, shape, _packed(shape), linear.bias)
        setattr(model.get_submodule(parent), leaf, LoraLinear(frozen, rank, 2.0, 0.0))
    replace_modules(model, lambda module, stand_in: True)  # other tests compare the numbers
    for norm in model.modules() if attention == varlen_memory.NAME else ():
        if isinstance(norm, LeanNorm) and list(norm._parameters) == ["weight"]:
            norm.forward = partial(rms_norm, weight=norm.weight, form=NormForm(1e-6, 0))  # a GPU's kernel
    return model.train()


def _packed(shape: tuple[int, int]) -> FourBitTensors:
    blocks = -(-shape[0] * shape[1] // 64)
    codes = torch.empty(-(-shape[0] * shape[1] // 2), dtype=torch.uint8)
    return FourBitTensors(codes, torch.empty(blocks, dtype=torch.uint8), torch.empty(-(-blocks // 256)), torch.empty(1))


class _Step:
    """The model layer by layer: masks are not built from values, since fake tensors have none."""

    def __init__(self, model: Any, dtype: torch.dtype, sequences: int, tokens: int, documents: int) -> None:
        self.model, self.decoder = model, model.get_decoder()
        with torch.device("cpu"):  # measures the head's formula, which takes numbers
            self.head = Head(model)
        self.ids = torch.zeros(sequences, tokens, dtype=torch.int64)
        self.positions = torch.arange(tokens)[None]
        hidden = torch.empty(sequences, tokens, model.config.hidden_size, dtype=dtype)
        kinds = ("full_attention",) if model.config.model_type == "gemma3_text" else ()
        self.rotary = self.decoder.rotary_emb(hidden, self.positions, *kinds)
        eager = model.config._attn_implementation == "eager"  # adds its mask to the scores
        self.mask = torch.zeros(sequences, 1, tokens, tokens, dtype=dtype) if eager else None
        starts = tuple(range(0, tokens, tokens // documents))
        self.documents = documents_of((starts,) * sequences, tokens, hidden.device) if documents > 1 else None

    def measure(self, recompute: int) -> Measured:
        """Static bytes, bytes saved by one layer, and both peaks."""
        parameters = list(self.model.parameters())
        sizes = {id(value.untyped_storage()): value.untyped_storage().nbytes() for value in parameters}
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        measured = Measured(sum(sizes.values()), self.kept(set(sizes)), 0, 0)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        with LiveBytes([*parameters, *self.model.buffers(), *gradients, self.ids, *self.shared()]) as live:
            loss = self.loss(self.hidden(recompute))
            measured.loss = live.peak
            live.reset_peak()
            loss.backward()
            measured.backward = live.peak
        return measured

    def shared(self) -> list[Tensor]:
        """Tensors that are made once for all layers."""
        return [self.positions, *self.rotary, *([self.mask] if self.mask is not None else [])]

    def kept(self, parameters: set[int]) -> int:
        """Bytes that a layer saves for backward, its own input included."""
        outside = {id(tensor.untyped_storage()) for tensor in self.shared()} | parameters
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
        """The last hidden states, after the final norm."""
        x = self.embedded()
        for index in range(len(self.decoder.layers)):
            layer = self.layer(index)
            x = checkpoint(layer, x, use_reentrant=False) if index < recompute else layer(x)
        return self.decoder.final_layer_norm(x) if hasattr(self.decoder, "final_layer_norm") else self.decoder.norm(x)

    def layer(self, index: int) -> Callable[[Tensor], Tensor]:
        """A decoder layer as a function of its input."""
        kwargs = {"position_embeddings": self.rotary, "attention_mask": self.mask, "position_ids": self.positions}
        kwargs |= {"documents": self.documents} if self.documents else {}

        def forward(x: Tensor) -> Tensor:
            out = self.decoder.layers[index](x, **kwargs)
            return out[0] if isinstance(out, tuple) else out

        return forward

    def loss(self, hidden: Tensor) -> Tensor:
        """The loss with every token trained."""
        selected = hidden.flatten(0, 1) + 0  # a copy, as the selection of trained tokens makes
        return FrozenHeadLoss.apply(selected, self.ids.flatten(), self.head)
