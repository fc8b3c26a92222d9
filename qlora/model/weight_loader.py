"""One pass over a base's files: every tensor goes to the place that the model has for it, linear layers quantised.

Other threads read and hash ahead (ahead.py). Host memory stays at what is packed so far, what waits, and the tensor at
hand as it is stored. Several processes take the layers in turns: each is read and quantised by one and handed to all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlora.distributed.broadcast import Payload, deal
from qlora.distributed.processes import Processes
from qlora.errors import BaseModelError
from qlora.model.bnb_checkpoint import companions, is_prequantized, read
from qlora.model.dtypes import name_of
from qlora.model.fingerprint import Fingerprint
from qlora.model.meta_model import linear_paths, renamer
from qlora.model.module_tree import LayerSharder, put, put_all, tensors_of, unit_of
from qlora.model.numerics import arithmetic_of
from qlora.model.prefetch import AHEAD_BYTES, PerThread, ahead
from qlora.model.safetensors_reader import Shards
from qlora.quant.linear import FLOATS, FrozenLinear

Report = Callable[[int, int], None]  # (bytes of the files done, bytes in all)


class Quantizer(Protocol):
    """Anything of the QUANTIZERS table."""

    def quantize(self, weight: Tensor, bias: Tensor | None) -> FrozenLinear:
        """Store a weight [O, I]."""


@dataclass(frozen=True)
class LoadTarget:
    """How the base is to be stored, and where."""

    quantizer: Quantizer
    dtype: torch.dtype
    device: torch.device
    on_host: Callable[[str], bool] = lambda path: False  # whether the linear layer at a path stays in main memory
    processes: Processes | None = None  # that share the reading; None: this one reads for itself

    def home(self, path: str) -> torch.device:
        """Where the frozen layer at a path is put; what is to be sharded begins on the device."""
        waits = self.on_host(path) and not (self.processes and self.processes.shards)
        return torch.device("cpu") if waits else self.device


@dataclass(frozen=True)
class _Wanted:
    """A parameter of the model and where it is in the files; `bias` of a linear layer is taken along."""

    key: str
    name: str
    path: str | None  # of the linear layer it is the weight of
    bias: str | None
    size_bytes: int


@dataclass(frozen=True)
class _Read:
    """What a reader found for it: a tensor as it is stored, or a layer that was stored in 4 bits."""

    found: Tensor | FrozenLinear
    bias: Tensor | None = None


@dataclass(frozen=True)
class LoadResult:
    """What a pass over the files found out: the fingerprint, and the keys that the model has no place for."""

    sha256: str
    ignored: tuple[str, ...]
    prequantized: bool = False  # whether it was stored in 4 bits already


class WeightLoader:
    """Fills a model whose parameters are on meta."""

    def __init__(self, model: nn.Module, folder: Path, aim: LoadTarget, sharing: LayerSharder | None = None) -> None:
        self.model, self.folder, self.aim, self.sharing = model, folder, aim, sharing
        self.shards = Shards(folder)
        self.linears = set(linear_paths(model))
        self.fingerprint = Fingerprint()
        config: Any = model.config
        self.fingerprint.add_text("config.json", arithmetic_of(config.get_text_config().to_dict()))

    def run(self, report: Report) -> LoadResult:
        """Fill the model.

        BaseModelError, naming the key, for what is missing, damaged, or has another shape than config.json says.
        """
        places = self._places()
        wanted = [each for key, name in places.items() if name is not None and (each := self._wanted(key, name))]
        if self.sharing is None:
            self._fill(wanted, report)
        else:
            self._fill_together(wanted, self.sharing, report)
        self.model.tie_weights()  # type: ignore[operator]
        self._refuse_missing()
        ignored = tuple(key for key, name in places.items() if name is None)
        return LoadResult(
            self.fingerprint.hexdigest(), ignored, any(is_prequantized(key, self.shards) for key in places)
        )

    def _fill(
        self, wanted: Sequence[_Wanted], report: Report = lambda done, total: None, ahead_bytes: int = AHEAD_BYTES
    ) -> None:
        """Read and place what is wanted."""
        mine = PerThread(self.shards.beside)
        total, done = sum(each.size_bytes for each in wanted), 0
        reading = ahead(wanted, lambda item: item.size_bytes, lambda item: self._read(item, mine.own), ahead_bytes)
        for each, found in reading:
            self._place(each, found)
            done += each.size_bytes
            report(done, total)

    def _fill_together(self, wanted: Sequence[_Wanted], sharing: LayerSharder, report: Report) -> None:
        """The same, a layer by one process and then handed to all; each keeps its share of it before the next comes."""
        units: dict[str, list[_Wanted]] = {}
        for each in wanted:
            units.setdefault(unit_of(each.name), []).append(each)
        total, done = sum(each.size_bytes for each in wanted), 0
        for unit, parcel in deal(sharing.processes, [*units.values()], self._parcel, BaseModelError):
            self.fingerprint.digests |= parcel.note["digests"]
            put_all(self.model, parcel.tensors, parcel.note["layers"], self.aim.home)  # the maker's own copy goes
            del parcel
            sharing.finish([each.name for each in unit])
            done += sum(each.size_bytes for each in unit)
            report(done, total)

    def _parcel(self, unit: Sequence[_Wanted]) -> Payload:
        """A unit read, quantised, placed here, and ready to be sent."""
        self._fill(unit, ahead_bytes=AHEAD_BYTES // 4)  # the others read ahead too
        tensors, layers = tensors_of(self.model, [each.name for each in unit])
        names = [name for each in unit for name in (each.name, f"{each.path}.bias")]
        digests = {name: self.fingerprint.digests[name] for name in names if name in self.fingerprint.digests}
        return Payload(tensors, {"layers": layers, "digests": digests})

    def _places(self) -> dict[str, str | None]:
        """File key -> parameter name, None where the model has no such parameter; companions of 4-bit keys left out."""
        rename = renamer(self.model, self.folder)
        tied = set(self.model.all_tied_weights_keys)  # type: ignore[arg-type]
        parts = {part for key in self.shards if is_prequantized(key, self.shards) for part in companions(key)}
        wanted = dict(self.model.named_parameters()).keys() - tied
        places: dict[str, str | None] = {}
        for key in self.shards:
            if key not in parts:
                name = rename(key)
                # A tied head stored beside its embedding adds nothing: it is neither read nor hashed.
                if name not in tied:
                    places[key] = name if name in wanted else None
        return places

    def _wanted(self, key: str, name: str) -> _Wanted | None:
        """What is read for a key; None for a linear layer's bias, which comes with its weight."""
        path, _, leaf = name.rpartition(".")
        if path not in self.linears:
            return _Wanted(key, name, None, None, self.shards.size_bytes(key))
        if leaf != "weight":
            return None
        bias: str | None = None
        if self.model.get_submodule(path).bias is not None:
            bias = key.removesuffix("weight") + "bias"
            if bias not in self.shards:
                raise BaseModelError(f"model: {self.folder}: {bias!r} is missing. Fetch the folder again.")
        return _Wanted(key, name, path, bias, self.shards.size_bytes(key))

    def _read(self, wanted: _Wanted, shards: Shards) -> _Read:
        """Read, check and hash, in a thread that has `shards` to itself."""
        key = wanted.key
        bias = self._read_bias(wanted, shards) if wanted.bias else None
        if is_prequantized(key, self.shards):
            if wanted.path is None:
                raise BaseModelError(
                    f"model: {self.folder}: {key!r} is stored in 4 bits, but only linear layers may be."
                )
            layer = read(key, shards.__getitem__, shards, bias)
            stored = [tensor for _, tensor in sorted(layer.named_parameters(recurse=False))]
            self.fingerprint.add(wanted.name, stored)
            return _Read(layer)
        tensor = shards[key]
        if wanted.path is None:
            self._check(key, tensor, wanted.name)
        self._check_dtype(key, tensor)
        self.fingerprint.add(wanted.name, [tensor])
        return _Read(tensor, bias)

    def _read_bias(self, wanted: _Wanted, shards: Shards) -> Tensor:
        key, name = str(wanted.bias), f"{wanted.path}.bias"
        bias = shards[key]
        self._check(key, bias, name)
        self.fingerprint.add(name, [bias])
        return bias.to(self.aim.dtype, copy=True)

    def _place(self, wanted: _Wanted, read: _Read) -> None:
        """Put what was read in its place, quantised if it is a linear layer's."""
        if wanted.path is None and isinstance(read.found, Tensor):
            value = read.found.to(self.aim.device, self.aim.dtype, copy=True)  # not the file's own pages
            put(self.model, wanted.name, nn.Parameter(value, requires_grad=False))
            return
        path = str(wanted.path)
        layer = read.found if isinstance(read.found, FrozenLinear) else self._quantized(wanted.key, read)
        skeleton: Any = self.model.get_submodule(path)
        if (layer.out_features, layer.in_features) != (skeleton.out_features, skeleton.in_features):
            raise BaseModelError(
                f"model: {self.folder}: {wanted.key!r} is {[layer.out_features, layer.in_features]}, "
                f"but config.json wants {[skeleton.out_features, skeleton.in_features]}."
            )
        put(self.model, path, layer.to(self.aim.home(path)))

    def _quantized(self, key: str, read: _Read) -> FrozenLinear:
        to = partial(torch.Tensor.to, device=self.aim.device, dtype=self.aim.dtype)
        try:
            return self.aim.quantizer.quantize(to(read.found), None if read.bias is None else to(read.bias))
        except BaseModelError as error:
            raise BaseModelError(f"model: {self.folder}: {key!r}: {error}") from error

    def _check(self, key: str, tensor: Tensor, name: str) -> None:
        self._check_dtype(key, tensor)
        expected = tuple(self.model.get_parameter(name).shape)
        if not all(bool(end.isfinite()) for end in torch.aminmax(tensor)):
            raise BaseModelError(f"model: {self.folder}: {key!r} holds NaN or infinity. Is the file damaged?")
        if tuple(tensor.shape) != expected:
            raise BaseModelError(
                f"model: {self.folder}: {key!r} is {list(tensor.shape)}, but config.json wants {list(expected)}."
            )

    def _check_dtype(self, key: str, tensor: Tensor) -> None:
        if tensor.dtype not in FLOATS:
            raise BaseModelError(
                f"model: {self.folder}: {key!r} is stored as {name_of(tensor.dtype)}, which needs scales that can't be "
                "read yet. Take the 16-bit checkpoint, or one in bitsandbytes' 4 bits."
            )

    def _refuse_missing(self) -> None:
        missing = [name for name, parameter in self.model.named_parameters() if parameter.is_meta]
        if missing:
            listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise BaseModelError(f"model: {self.folder} lacks {listed}. Fetch the folder again.")
