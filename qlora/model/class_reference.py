"""The class's own model on the same stored weights: what a loaded base is compared with before a run.

Built on `meta` with eager attention. Every parameter is shared with the loaded model, a frozen matrix is dequantized
when it is used: the reference takes no memory of its own beyond one matrix and the buffers.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.errors import BaseModelError
from qlora.model.buffers import compute_buffers
from qlora.model.expert_forward import expert_stacks
from qlora.model.host_table import HostTable
from qlora.model.module_tree import path_of, set_by_path
from qlora.model.random_weights import LowRankLinear
from qlora.model.wrapper_models import build_class
from qlora.quant.expert_stack import ExpertStack
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


class _DequantizedStack:
    """What an experts class reads as its parameter: one expert's matrix or bias, dequantized on each use."""

    def __init__(self, stack: ExpertStack, dtype: torch.dtype, is_bias: bool) -> None:
        self._stack, self._dtype, self._is_bias = stack, dtype, is_bias

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        """The matrix [O, I] or [I, O] as the class holds it, or the bias [O]."""
        layer: Any = self._stack[int(expert)]
        if self._is_bias:
            return layer.bias.to(self._dtype)  # type: ignore[no-any-return]
        weight: Tensor = layer.weight(self._dtype)
        return weight.t() if self._stack.transposed else weight


def build_reference(model: Any) -> nn.Module:
    """The class's own model with the parameters of `model`, in evaluation mode.

    BaseModelError if `model` lacks one of them.
    """
    embedding = model.get_input_embeddings()
    device = next(value.device for value in model.get_output_embeddings().parameters())
    with torch.device("meta"):
        reference = build_class(copy.deepcopy(model.config), embedding.weight.dtype, "eager")
    is_tied = reference.get_output_embeddings().weight is reference.get_input_embeddings().weight
    reference.requires_grad_(False)
    compute_buffers(reference, device)
    own = dict(model.named_modules())
    for path, stack in expert_stacks(model).items():
        _share_stack(reference, path, stack, embedding.weight.dtype)
    for path, module in list(reference.named_modules()):
        stand_in = _stand_in(own.get(path))
        if stand_in is not None:
            set_by_path(reference, path, stand_in)
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


def _stand_in(module: nn.Module | None) -> nn.Module | None:
    """What runs in place of a module of the class; None: the class's own with the parameters of `module`."""
    if isinstance(module, FrozenLinear):
        return _Dequantized(module)
    return module if isinstance(module, HostTable) else None


def _share_stack(reference: nn.Module, path: str, stack: ExpertStack, dtype: torch.dtype) -> None:
    """Let the class's own forward of an experts module read the matrices of `stack`."""
    parent, _, name = path.rpartition(".")
    experts: Any = reference.get_submodule(parent)
    for leaf, is_bias in ((name, False), (f"{name}_bias", True)):
        if experts._parameters.pop(leaf, None) is not None:
            setattr(experts, leaf, _DequantizedStack(stack, dtype, is_bias))
    experts.config._experts_implementation = "eager"


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
