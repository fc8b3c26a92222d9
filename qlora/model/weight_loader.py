"""Streaming weight loader: one pass over a model folder fills a model on `meta`, linear layers quantized on the way.

Other threads read and hash the next tensors (prefetch.py). Host memory holds what is quantized so far, the prefetched
tensors, and one tensor in its stored dtype. Several ranks take turns: one reads and quantizes a layer and broadcasts
it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.distributed.broadcast import Payload, broadcast_in_turns
from qlora.distributed.processes import Processes
from qlora.errors import BaseModelError
from qlora.model.bnb_checkpoint import companion_keys, is_prequantized, read_4bit_layer, refuse_kept
from qlora.model.checkpoint_reader import CheckpointReader
from qlora.model.dtypes import loaded_dtype
from qlora.model.fingerprint import Fingerprint
from qlora.model.layer_sharder import LayerSharder
from qlora.model.layouts.checkpoint_layout import CheckpointLayout, read_layout
from qlora.model.layouts.pieces import TensorSource
from qlora.model.linear_layers import linear_paths
from qlora.model.module_tree import set_by_path, set_tensor, set_tensors, tensor_of, tensors_of, unit_path
from qlora.model.numerics import canonical_numerics
from qlora.model.open_checkpoint import open_checkpoint
from qlora.model.prefetch import PREFETCH_BYTES, PerThread, prefetch
from qlora.model.tensor_checks import check_complete, check_dtype, check_values
from qlora.quant import Keeping, Quantizer, quantizer_at
from qlora.quant.linear import FrozenLinear
from qlora.quant.released.second_error import relative_error

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
    """A parameter or buffer and its source in the files; a linear layer's bias is read with its weight."""

    source: TensorSource
    dtype: torch.dtype  # in the model
    shape: tuple[int, ...]
    linear_path: str | None  # of the linear layer whose weight this is
    bias: TensorSource | None
    size_bytes: int

    @property
    def key(self) -> str:
        """Its first checkpoint key, for messages."""
        return self.source.key

    @property
    def name(self) -> str:
        """Its name in the model."""
        return self.source.name


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
    decoded: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # path -> released format, second_error


class WeightLoader:
    """Fills a model whose parameters are on `meta`."""

    def __init__(self, model: nn.Module, folder: Path, target: LoadTarget, sharder: LayerSharder | None = None) -> None:
        self.model, self.folder, self.target, self.sharder = model, folder, target, sharder
        self.reader = open_checkpoint(folder)
        self.linears = set(linear_paths(model))
        if isinstance(target.quantizer, Keeping):
            target.quantizer.refuse_unused(self.linears)
        self.fingerprint = Fingerprint()
        self.decoded: dict[str, dict[str, Any]] = {}
        config: Any = model.config
        self.fingerprint.add_text("config.json", canonical_numerics(config.get_text_config().to_dict()))

    def run(self, report: Report) -> LoadResult:
        """Fill the model.

        BaseModelError, naming the key, for a tensor that is missing, damaged, or of a shape other than config.json's.
        """
        packed = [key for key in self.reader if is_prequantized(key, self.reader)]
        companions = {companion for key in packed for companion in companion_keys(key)}
        layout = read_layout(self.model, self.reader, companions)
        candidates = (self._parameter(source, layout) for source in layout.sources.values())
        parameters = [parameter for parameter in candidates if parameter is not None]
        if self.sharder is None:
            self._fill(parameters, report)
        else:
            self._fill_together(parameters, self.sharder, report)
        self.model.tie_weights()  # type: ignore[operator]
        check_complete(self.folder, self.model)
        return LoadResult(self.fingerprint.hexdigest(), layout.ignored, bool(packed), self.decoded)

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
            self.decoded |= payload.metadata["decoded"]
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
        paths = [parameter.linear_path for parameter in unit]
        decoded = {path: self.decoded[path] for path in paths if path in self.decoded}
        return Payload(tensors, {"layers": layers, "digests": digests, "decoded": decoded})

    def _parameter(self, source: TensorSource, layout: CheckpointLayout) -> _Parameter | None:
        """The parameter or buffer of a source; None for a linear layer's bias, which is read with its weight."""
        name = source.name
        path, _, leaf = name.rpartition(".")
        if path not in self.linears:
            tensor = tensor_of(self.model, name)
            dtype = loaded_dtype(self.model, name, tensor, self.target.dtype)
            return _Parameter(source, dtype, tuple(tensor.shape), None, None, source.size_bytes(self.reader))
        if leaf != "weight":
            return None
        bias: TensorSource | None = None
        if self.model.get_submodule(path).bias is not None:
            bias = layout.sources.get(f"{path}.bias")
            if bias is None:
                key = source.key.removesuffix("weight") + "bias"
                raise BaseModelError(f"model: {self.folder}: {key!r} is missing. Fetch the folder again.")
        return _Parameter(source, self.target.dtype, self._shape(name), path, bias, source.size_bytes(self.reader))

    def _read(self, parameter: _Parameter, reader: CheckpointReader) -> _ReadResult:
        """Read, check and hash, in a thread that `reader` belongs to."""
        key = parameter.key
        bias = self._read_bias(parameter.bias, reader) if parameter.bias else None
        if is_prequantized(key, self.reader):
            if parameter.linear_path is None or not parameter.source.is_whole:
                raise BaseModelError(f"model: {self.folder}: {key!r} is stored in 4 bits; allowed: linear layers only.")
            refuse_kept(self.target.quantizer, parameter.linear_path, self.folder)
            layer = read_4bit_layer(key, reader.__getitem__, reader, bias)
            stored = [tensor for _, tensor in sorted(layer.named_parameters(recurse=False))]
            self.fingerprint.add(parameter.name, stored)
            return _ReadResult(layer)
        tensor = parameter.source.read(reader)
        if parameter.dtype.is_floating_point:
            check_dtype(self.folder, key, tensor)
        if parameter.linear_path is None:
            check_values(self.folder, key, tensor, parameter.shape)
        self.fingerprint.add(parameter.name, [tensor])
        return _ReadResult(tensor, bias)

    def _read_bias(self, source: TensorSource, reader: CheckpointReader) -> Tensor:
        bias = source.read(reader)
        check_dtype(self.folder, source.key, bias)
        check_values(self.folder, source.key, bias, self._shape(source.name))
        self.fingerprint.add(source.name, [bias])
        return bias.to(self.target.dtype, copy=True)

    def _set(self, parameter: _Parameter, result: _ReadResult) -> None:
        """Set a tensor in the model; a linear layer's weight is quantized first."""
        if parameter.linear_path is None and isinstance(result.value, Tensor):
            value = result.value.to(self.target.device, parameter.dtype, copy=True)  # not a view of the mapped file
            set_tensor(self.model, parameter.name, value)
            return
        path = str(parameter.linear_path)
        layer = result.value if isinstance(result.value, FrozenLinear) else self._quantize(parameter, result)
        linear: Any = self.model.get_submodule(path)
        if (layer.out_features, layer.in_features) != (linear.out_features, linear.in_features):
            raise BaseModelError(
                f"model: {self.folder}: {parameter.key!r} is {[layer.out_features, layer.in_features]}, "
                f"but config.json needs {[linear.out_features, linear.in_features]}."
            )
        set_by_path(self.model, path, layer.to(self.target.device_of(path)))

    def _quantize(self, parameter: _Parameter, result: _ReadResult) -> FrozenLinear:
        """The frozen layer of a matrix; for a decoded one, its format and its error are noted for the manifest."""
        to = partial(torch.Tensor.to, device=self.target.device, dtype=self.target.dtype)
        weight = to(result.value)
        try:
            quantizer = quantizer_at(self.target.quantizer, str(parameter.linear_path))
            layer = quantizer.quantize(weight, None if result.bias is None else to(result.bias))
        except BaseModelError as error:
            raise BaseModelError(f"model: {self.folder}: {parameter.key!r}: {error}") from error
        released = self.reader.stored_format(parameter.key)
        if released:
            error_size = round(relative_error(weight, layer), 5)
            self.decoded[str(parameter.linear_path)] = {"released": released, "second_error": error_size}
        return layer

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(tensor_of(self.model, name).shape)
