"""A model's modules and parameters by dotted path: read, replaced, and rebuilt from named tensors.

The named tensors of frozen layers are what ranks broadcast to each other while a base loads, and what the cache of the
quantized base stores.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora.quant import QUANTIZERS
from qlora.quant.linear import FrozenLinear

LAYER = re.compile(r"(?:[A-Za-z_]\w*\.)+?\d+(?![^.])")  # path of a decoder layer: up to the first number
LayerDescriptions = Mapping[str, Mapping[str, Any]]  # path of a frozen layer -> FrozenLinear.describe()


def unit_path(name: str) -> str:
    """The path of the decoder layer that a parameter belongs to; outside the layers, its own name."""
    layer = LAYER.match(name)
    return layer.group() if layer else name


def decoder_of(model: nn.Module) -> Any:
    """The module between token ids and the head's input; what transformers names so may be the model, or its head."""
    outer = (model, model.get_output_embeddings())  # type: ignore[operator]
    candidates = (model.get_decoder(), getattr(model, "base_model", None), getattr(model, "model", None))  # type: ignore[operator]
    return next((decoder for decoder in candidates if decoder is not None and decoder not in outer), model)


def is_decoder_layer(module: nn.Module) -> bool:
    """Whether the module's class, or a base class of it, has transformers' switch for checkpointing."""
    return "gradient_checkpointing" in {name for kind in type(module).__mro__ for name in vars(kind)}


def path_of(model: nn.Module, module: nn.Module) -> str:
    """The dotted path of a submodule."""
    return next(str(path) for path, other in model.named_modules() if other is module)


def set_by_path(model: nn.Module, path: str, value: nn.Module | Tensor) -> None:
    """Replace the submodule, parameter or buffer at a dotted path ("layers.0.mlp.up_proj")."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer at a dotted path."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    tensor = module._buffers.get(leaf)
    return getattr(module, leaf) if tensor is None else tensor  # type: ignore[no-any-return]


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace the buffer or the frozen parameter at a dotted path."""
    parent, _, leaf = name.rpartition(".")
    is_buffer = leaf in model.get_submodule(parent)._buffers
    set_by_path(model, name, value if is_buffer else nn.Parameter(value, requires_grad=False))


def tensors_of(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The stored tensors of parameters named as in the files (`...up_proj.weight`), and their frozen layers' kinds."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for name in names:
        path = name.rpartition(".")[0]
        module = model.get_submodule(path)
        if isinstance(module, FrozenLinear):
            layers[path] = module.describe()
            tensors |= {f"{path}.{leaf}": value.detach() for leaf, value in module.named_parameters(recurse=False)}
        else:
            tensors[name] = tensor_of(model, name).detach()
    return tensors, layers


def set_tensors(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    layers: LayerDescriptions,
    device: torch.device,
    device_of: Callable[[str], torch.device],
) -> None:
    """Set tensors by name: frozen layers are rebuilt and moved to `device_of(path)`, all others to `device`."""
    for path in {name.rpartition(".")[0] for name in tensors} & layers.keys():
        stored = {
            name.removeprefix(f"{path}."): value for name, value in tensors.items() if name.startswith(f"{path}.")
        }
        set_by_path(model, path, layer_from_tensors(layers[path], stored).to(device_of(path)))
    for name, value in tensors.items():
        if name.rpartition(".")[0] not in layers:
            set_tensor(model, name, value.to(device))


def layer_from_tensors(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FrozenLinear:
    """The frozen layer with this `describe()` and these tensors."""
    layer: FrozenLinear = QUANTIZERS[description["kind"]].restore(description, tensors)
    return layer
