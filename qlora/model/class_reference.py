"""The class's own model on the same stored weights: what a loaded base is compared with before a run.

Built on `meta` with eager attention. Every parameter is shared with the loaded model, a frozen matrix is dequantized
when it is used: the reference takes no memory of its own beyond one matrix and the buffers.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from qlora.errors import BaseModelError
from qlora.model.buffers import compute_buffers
from qlora.model.module_tree import path_of, set_by_path
from qlora.model.random_weights import LowRankLinear
from qlora.quant.linear import FrozenLinear
from qlora.utils.devices import same_device


class _Dequantized(nn.Module):
    """A linear layer of the class, whose weight is dequantized on each use."""

    def __init__(self, layer: FrozenLinear) -> None:
        super().__init__()
        self._layer = [layer]  # in a list, so that it is no submodule
        self.out_features, self.in_features = layer.out_features, layer.in_features

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] -> [..., O]."""
        layer = self._layer[0]
        if isinstance(layer, LowRankLinear):  # of a class that runs before its weights are read
            return layer(x)  # type: ignore[no-any-return]
        return F.linear(x, layer.weight(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def build_reference(model: Any) -> nn.Module:
    """The class's own model with the parameters of `model`, in evaluation mode.

    BaseModelError if `model` lacks one of them.
    """
    embedding = model.get_input_embeddings()
    device = next(value.device for value in model.get_output_embeddings().parameters())
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(
            copy.deepcopy(model.config), dtype=embedding.weight.dtype, attn_implementation="eager"
        )
    is_tied = reference.get_output_embeddings().weight is reference.get_input_embeddings().weight
    reference.requires_grad_(False)
    compute_buffers(reference, device)
    own = dict(model.named_modules())
    for path, module in list(reference.named_modules()):
        if isinstance(own.get(path), FrozenLinear):
            set_by_path(reference, path, _Dequantized(own[path]))  # type: ignore[arg-type]
        elif path in own:
            _share(module, own[path])
    if is_tied:
        head = reference.get_output_embeddings()
        head.__dict__["_parameters"] = head._parameters | {"weight": embedding.weight}
    if not same_device(embedding.weight.device, device):  # an embedding on the host has hooks that move ids and rows
        set_by_path(reference, path_of(model, embedding), embedding)
    missing = [name for name, parameter in reference.named_parameters() if parameter.is_meta]
    if missing:
        raise BaseModelError(f"model: {type(model).__name__} was loaded without {missing[0]}. Choose another base.")
    return reference.eval()  # type: ignore[no-any-return]


def _share(module: nn.Module, own: Any) -> None:
    """Let `module` use the parameters and stored buffers of `own`, also while FSDP replaces them by full ones."""
    module.__dict__["_parameters"] = own._parameters
    for name, buffer in own._buffers.items():
        if name not in own._non_persistent_buffers_set:
            module._buffers[name] = buffer
    if hasattr(own, "unshard") and hasattr(own, "reshard"):
        module.register_forward_pre_hook(lambda *_: _ignore(own.unshard()))
        module.register_forward_hook(lambda *_: _ignore(own.reshard()))


def _ignore(_: Any) -> None:
    """A hook's return value would replace the module's arguments or result."""
