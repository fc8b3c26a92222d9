"""Parts of a base on their way: the tensors of frozen layers under their names, and the model filled from them.

What several processes hand each other while a base is read, and what the kept base is made of.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora.distributed.processes import Processes
from qlora.model.lean_modules import lean
from qlora.quant.dense import DenseLinear
from qlora.quant.fourbit import FourBitLinear, FourBitTensors
from qlora.quant.linear import FrozenLinear

LAYER = re.compile(r"(?:[A-Za-z_]\w*\.)+?\d+(?![^.])")  # the path of a layer: up to the first number
Described = Mapping[str, Mapping[str, Any]]  # path of a frozen layer -> FrozenLinear.describe()


def unit_of(name: str) -> str:
    """The layer that a parameter belongs to; one outside the layers is a unit of its own."""
    found = LAYER.match(name)
    return found.group() if found else name


def tensors_of(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors behind parameter names of the files (`...up_proj.weight`), and the frozen layers among them."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for name in names:
        path = name.rpartition(".")[0]
        module = model.get_submodule(path)
        if isinstance(module, FrozenLinear):
            layers[path] = module.describe()
            tensors |= {f"{path}.{leaf}": value.detach() for leaf, value in module.named_parameters(recurse=False)}
        else:
            tensors[name] = model.get_parameter(name).detach()
    return tensors, layers


def put(model: nn.Module, path: str, value: nn.Module | nn.Parameter) -> None:
    """Let `path` be `value`."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)


def put_all(
    model: nn.Module, tensors: Mapping[str, Tensor], layers: Described, home: Callable[[str], torch.device]
) -> None:
    """Put tensors by their names where they belong; those of a frozen layer go where `home` says, others stay."""
    for path in {name.rpartition(".")[0] for name in tensors} & layers.keys():
        own = {name.removeprefix(f"{path}."): value for name, value in tensors.items() if name.startswith(f"{path}.")}
        put(model, path, rebuilt(layers[path], own).to(home(path)))
    for name, value in tensors.items():
        if name.rpartition(".")[0] not in layers:
            put(model, name, nn.Parameter(value, requires_grad=False))


def rebuilt(described: Mapping[str, Any], own: Mapping[str, Tensor]) -> FrozenLinear:
    """The frozen layer that `describe` and its tensors are of."""
    if described["kind"] == "dense":
        return DenseLinear(own["dense"], own.get("bias"))
    names = ("codes", "absmax", "nested_absmax", "offset", "absmax_levels")
    stored = FourBitTensors(**{name: own[name] for name in names if name in own})
    rows, columns = described["shape"]
    return FourBitLinear(described["kind"], described["block"], (rows, columns), stored, own.get("bias"))


class LayerSharder:
    """The units of a model that are sharded as soon as they are whole, so that no process ever holds the model."""

    def __init__(self, model: nn.Module, processes: Processes, on_host: Callable[[str], bool]) -> None:
        self.model, self.processes, self.on_host = model, processes, on_host
        self._agreeing: dict[type, bool] = {}
        self._waiting: dict[str, nn.Module] = {}
        tied: Any = model.all_tied_weights_keys
        for path, module in model.named_modules():
            is_end = module in self._ends() and not tied
            if processes.shards and (LAYER.fullmatch(path) or is_end):
                self._waiting[path] = module

    def finish(self, names: Iterable[str]) -> None:
        """Shard the units that have all their tensors, now that those named were put on every process."""
        for path in sorted({path for name in names for path in (unit_of(name), name.rpartition(".")[0])}):
            module = self._waiting.get(path)
            if module is None or any(parameter.is_meta for parameter in module.parameters()):
                continue
            del self._waiting[path]
            lean(module, self._agreeing)
            self._shard(path, module)

    def finish_rest(self) -> None:
        """Shard what stands outside the layers; tied ends stay whole, being needed first and last."""
        if not self.processes.shards:
            return
        decoder: nn.Module = self.model.get_decoder()  # type: ignore[operator]
        ends = {id(value) for end in self._ends() for value in end.parameters()}
        inside = [value for value in decoder.parameters() if id(value) in ends and not hasattr(value, "to_local")]
        self.processes.shard(decoder, whole=inside)

    def _shard(self, path: str, module: nn.Module) -> None:
        # The head is asked for chunk by chunk, and returned when the loss is known.
        self.processes.shard(module, lasting=module is self._ends()[-1], host=self.on_host(f"{path}."))
        for part in module.modules():
            if isinstance(part, FrozenLinear):
                part.fetch, part.home = partial(self.processes.bring, module, part), self.processes.device

    def _ends(self) -> tuple[nn.Module, nn.Module]:
        """Embedding and head."""
        model: Any = self.model
        return model.get_input_embeddings(), model.get_output_embeddings()
