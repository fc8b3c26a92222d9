"""Streaming weight loader: one pass over a model folder fills a model on `meta`, linear layers quantized on the way.

Other threads read and hash the next tensors (prefetch.py). Host memory holds what is quantized so far, the prefetched
tensors, and one tensor in its stored dtype. Several ranks take turns: one reads and quantizes a layer and broadcasts
it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.distributed.broadcast import Payload, broadcast_in_turns
from qlora.distributed.processes import Processes
from qlora.errors import BaseModelError
from qlora.model.bnb_checkpoint import companion_keys, is_prequantized, read_4bit_layer
from qlora.model.buffers import persistent_buffers
from qlora.model.dtypes import loaded_dtype
from qlora.model.fingerprint import Fingerprint
from qlora.model.layer_sharder import LayerSharder
from qlora.model.linear_layers import linear_paths
from qlora.model.meta_model import names_by_key
from qlora.model.module_tree import set_by_path, set_tensor, set_tensors, tensor_of, tensors_of, unit_path
from qlora.model.numerics import canonical_numerics
from qlora.model.prefetch import PREFETCH_BYTES, PerThread, prefetch
from qlora.model.safetensors_reader import SafetensorsReader
from qlora.model.tensor_checks import check_complete, check_dtype, check_values
from qlora.quant import Quantizer
from qlora.quant.linear import FrozenLinear

Report = Callable[[int, int], None]  # (bytes done, bytes in total) of the files


@dataclass(frozen=True)
class LoadTarget:
    """How a base model is stored in memory, and where."""

    quantizer: Quantizer
    dtype: torch.dtype
    device: torch.device
    on_host: Callable[[str], bool] = lambda path: False  # whether the linear layer at a path stays in host memory
    processes: Processes | None = None  # ranks that load together; None: this one loads alone

    def device_of(self, path: str) -> torch.device:
        """The device of the frozen layer at a path. A layer that will be sharded starts on `device`."""
        offloaded = self.on_host(path) and not (self.processes and self.processes.shards)
        return torch.device("cpu") if offloaded else self.device


@dataclass(frozen=True)
class _Parameter:
    """A parameter or buffer and its key in the files; a linear layer's bias is read with its weight."""

    key: str
    name: str
    dtype: torch.dtype  # in the model
    shape: tuple[int, ...]
    linear_path: str | None  # of the linear layer whose weight this is
    bias_key: str | None
    size_bytes: int


@dataclass(frozen=True)
class _ReadResult:
    """A tensor in its stored dtype, or a layer that was stored in 4 bits."""

    value: Tensor | FrozenLinear
    bias: Tensor | None = None


@dataclass(frozen=True)
class LoadResult:
    """The fingerprint of a loaded base, and the checkpoint keys that match no parameter of the model."""

    sha256: str
    ignored: tuple[str, ...]
    prequantized: bool = False  # whether the checkpoint has 4-bit tensors


class WeightLoader:
    """Fills a model whose parameters are on `meta`."""

    def __init__(self, model: nn.Module, folder: Path, target: LoadTarget, sharder: LayerSharder | None = None) -> None:
        self.model, self.folder, self.target, self.sharder = model, folder, target, sharder
        self.reader = SafetensorsReader(folder)
        self.linears = set(linear_paths(model))
        self.buffers = persistent_buffers(model)
        self.fingerprint = Fingerprint()
        config: Any = model.config
        self.fingerprint.add_text("config.json", canonical_numerics(config.get_text_config().to_dict()))

    def run(self, report: Report) -> LoadResult:
        """Fill the model.

        BaseModelError, naming the key, for a tensor that is missing, damaged, or of a shape other than config.json's.
        """
        names = self._names_by_key()
        candidates = (self._parameter(key, name) for key, name in names.items() if name is not None)
        parameters = [parameter for parameter in candidates if parameter is not None]
        if self.sharder is None:
            self._fill(parameters, report)
        else:
            self._fill_together(parameters, self.sharder, report)
        self.model.tie_weights()  # type: ignore[operator]
        check_complete(self.folder, self.model)
        ignored = tuple(key for key, name in names.items() if name is None)
        prequantized = any(is_prequantized(key, self.reader) for key in names)
        return LoadResult(self.fingerprint.hexdigest(), ignored, prequantized)

    def _fill(
        self, parameters: Sequence[_Parameter], report: Report = lambda done, total: None, budget: int = PREFETCH_BYTES
    ) -> None:
        """Read parameters and set them in the model."""
        readers = PerThread(self.reader.for_another_thread)
        total, done = sum(parameter.size_bytes for parameter in parameters), 0
        results = prefetch(
            parameters, lambda item: item.size_bytes, lambda item: self._read(item, readers.value), budget
        )
        for parameter, result in results:
            self._set(parameter, result)
            done += parameter.size_bytes
            report(done, total)

    def _fill_together(self, parameters: Sequence[_Parameter], sharder: LayerSharder, report: Report) -> None:
        """The same on several ranks: one reads a layer and broadcasts it; each keeps its shard before the next one."""
        units: dict[str, list[_Parameter]] = {}
        for parameter in parameters:
            units.setdefault(unit_path(parameter.name), []).append(parameter)
        total, done = sum(parameter.size_bytes for parameter in parameters), 0
        for unit, payload in broadcast_in_turns(sharder.processes, [*units.values()], self._payload, BaseModelError):
            self.fingerprint.digests |= payload.metadata["digests"]
            # On the rank that read the unit, this replaces its copy.
            set_tensors(
                self.model, payload.tensors, payload.metadata["layers"], self.target.device, self.target.device_of
            )
            del payload
            sharder.shard_complete([parameter.name for parameter in unit])
            done += sum(parameter.size_bytes for parameter in unit)
            report(done, total)

    def _payload(self, unit: Sequence[_Parameter]) -> Payload:
        """A unit, read and quantized on this rank, to be broadcast."""
        self._fill(unit, budget=PREFETCH_BYTES // 4)  # the other ranks prefetch too
        tensors, layers = tensors_of(self.model, [parameter.name for parameter in unit])
        names = [name for parameter in unit for name in (parameter.name, f"{parameter.linear_path}.bias")]
        digests = {name: self.fingerprint.digests[name] for name in names if name in self.fingerprint.digests}
        return Payload(tensors, {"layers": layers, "digests": digests})

    def _names_by_key(self) -> dict[str, str | None]:
        """Checkpoint key -> name of a parameter or buffer, None if the model has none; companions are left out."""
        packed = [key for key in self.reader if is_prequantized(key, self.reader)]
        companions = {companion for key in packed for companion in companion_keys(key)}
        known = {*dict(self.model.named_parameters(remove_duplicate=False)), *self.buffers}
        names = names_by_key(self.model, self.folder, (key for key in self.reader if key not in companions))
        return {key: name if name in known else None for key, name in names.items()}

    def _parameter(self, key: str, name: str) -> _Parameter | None:
        """The parameter or buffer of a key; None for a linear layer's bias, which is read with its weight."""
        path, _, leaf = name.rpartition(".")
        if path not in self.linears:
            tensor = tensor_of(self.model, name)
            dtype = loaded_dtype(self.model, name, tensor, self.target.dtype)
            return _Parameter(key, name, dtype, tuple(tensor.shape), None, None, self.reader.size_bytes(key))
        if leaf != "weight":
            return None
        bias_key: str | None = None
        if self.model.get_submodule(path).bias is not None:
            bias_key = key.removesuffix("weight") + "bias"
            if bias_key not in self.reader:
                raise BaseModelError(f"model: {self.folder}: {bias_key!r} is missing. Fetch the folder again.")
        size = self.reader.size_bytes(key)
        return _Parameter(key, name, self.target.dtype, self._shape(name), path, bias_key, size)

    def _read(self, parameter: _Parameter, reader: SafetensorsReader) -> _ReadResult:
        """Read, check and hash, in a thread that `reader` belongs to."""
        key = parameter.key
        bias = self._read_bias(parameter, reader) if parameter.bias_key else None
        if is_prequantized(key, self.reader):
            if parameter.linear_path is None:
                raise BaseModelError(f"model: {self.folder}: {key!r} is stored in 4 bits; allowed: linear layers only.")
            layer = read_4bit_layer(key, reader.__getitem__, reader, bias)
            stored = [tensor for _, tensor in sorted(layer.named_parameters(recurse=False))]
            self.fingerprint.add(parameter.name, stored)
            return _ReadResult(layer)
        tensor = reader[key]
        if parameter.dtype.is_floating_point:
            check_dtype(self.folder, key, tensor)
        if parameter.linear_path is None:
            check_values(self.folder, key, tensor, parameter.shape)
        self.fingerprint.add(parameter.name, [tensor])
        return _ReadResult(tensor, bias)

    def _read_bias(self, parameter: _Parameter, reader: SafetensorsReader) -> Tensor:
        key, name = str(parameter.bias_key), f"{parameter.linear_path}.bias"
        bias = reader[key]
        check_dtype(self.folder, key, bias)
        check_values(self.folder, key, bias, self._shape(name))
        self.fingerprint.add(name, [bias])
        return bias.to(self.target.dtype, copy=True)

    def _set(self, parameter: _Parameter, result: _ReadResult) -> None:
        """Set a tensor in the model; a linear layer's weight is quantized first."""
        if parameter.linear_path is None and isinstance(result.value, Tensor):
            value = result.value.to(self.target.device, parameter.dtype, copy=True)  # not a view of the mapped file
            set_tensor(self.model, parameter.name, value)
            return
        path = str(parameter.linear_path)
        layer = result.value if isinstance(result.value, FrozenLinear) else self._quantize(parameter.key, result)
        linear: Any = self.model.get_submodule(path)
        if (layer.out_features, layer.in_features) != (linear.out_features, linear.in_features):
            raise BaseModelError(
                f"model: {self.folder}: {parameter.key!r} is {[layer.out_features, layer.in_features]}, "
                f"but config.json needs {[linear.out_features, linear.in_features]}."
            )
        set_by_path(self.model, path, layer.to(self.target.device_of(path)))

    def _quantize(self, key: str, result: _ReadResult) -> FrozenLinear:
        to = partial(torch.Tensor.to, device=self.target.device, dtype=self.target.dtype)
        try:
            return self.target.quantizer.quantize(to(result.value), None if result.bias is None else to(result.bias))
        except BaseModelError as error:
            raise BaseModelError(f"model: {self.folder}: {key!r}: {error}") from error

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(tensor_of(self.model, name).shape)
