"""The frozen base: its skeleton on meta, its weights streamed tensor by tensor into frozen layers.

Host memory stays at what is packed so far plus one tensor as it is stored; a tensor is hashed while it is quantised.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlora.base import Model
from qlora.base.arithmetic import arithmetic_of
from qlora.base.dtypes import choose, has_bfloat16, name_of
from qlora.base.fingerprint import BaseManifest, Fingerprint
from qlora.base.folder import Folder, find
from qlora.base.lean import lean
from qlora.base.prequantized import companions, is_prequantized, read
from qlora.base.shards import Shards
from qlora.base.skeleton import build, linear_paths, read_config, read_tokenizer, renamer, stop_ids
from qlora.errors import BaseModelError
from qlora.quant.linear import FLOATS, FrozenLinear

Report = Callable[[int, int], None]  # (tensors read, tensors in all)


class Quantizer(Protocol):
    """Anything of the QUANTIZERS table."""

    def quantize(self, weight: Tensor, bias: Tensor | None) -> FrozenLinear:
        """Store a weight [O, I]."""


@dataclass(frozen=True)
class Base:
    """A frozen model ready to be adapted, with its tokenizer and the manifest of what it is."""

    model: nn.Module
    tokenizer: Any
    config: Any
    folder: Folder
    manifest: BaseManifest
    dtype: torch.dtype
    device: torch.device
    stops: tuple[int, ...]  # token ids that end an answer


def load(section: Model, quantizer: Quantizer, device: torch.device, report: Report = lambda done, total: None) -> Base:
    """The base of a recipe, its decoder's linear layers stored by `quantizer`, everything frozen on `device`.

    BaseModelError if the folder, its configuration or one of its tensors is not what is needed.
    """
    folder = find(section.name, section.revision)
    config = read_config(folder.path)
    dtype = choose(section.dtype, config.get_text_config().dtype or config.dtype, has_bfloat16(device))
    tokenizer = read_tokenizer(folder.path)
    model = build(config, dtype, section.attention, device)
    filling = _Filling(model, folder.path, quantizer, dtype, device)
    filling.fingerprint.add_text("config.json", arithmetic_of(config.get_text_config().to_dict()))
    fingerprint, ignored = filling.run(report)
    lean(model)
    quantized = {path: layer.describe() for path, layer in model.named_modules() if isinstance(layer, FrozenLinear)}
    manifest = BaseManifest(folder.name, folder.revision, fingerprint, name_of(dtype), quantized, tuple(ignored))
    stops = stop_ids(config, _generation_config(folder.path), tokenizer)
    return Base(model, tokenizer, config, folder, manifest, dtype, device, stops)


class _Filling:
    """One pass over the files: every tensor goes to the place the model has for it."""

    def __init__(
        self, model: nn.Module, folder: Path, quantizer: Quantizer, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.model, self.folder, self.quantizer, self.dtype, self.device = model, folder, quantizer, dtype, device
        self.shards = Shards(folder)
        self.linears = set(linear_paths(model))
        self.fingerprint = Fingerprint()
        self.hasher = ThreadPoolExecutor(max_workers=1)

    def run(self, report: Report) -> tuple[str, list[str]]:
        """Fill the model; returns the fingerprint and the keys that the model has no place for."""
        names = self._places()
        ignored = [key for key, name in names.items() if name is None]
        wanted = [(key, name) for key, name in names.items() if name is not None]
        for done, (key, name) in enumerate(wanted, start=1):
            self._fill(key, name)
            report(done, len(wanted))
        self.hasher.shutdown()
        self.model.tie_weights()  # type: ignore[operator]
        self._refuse_missing()
        return self.fingerprint.hexdigest(), ignored

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

    def _fill(self, key: str, name: str) -> None:
        path, _, leaf = name.rpartition(".")
        if path not in self.linears:
            return self._fill_plain(key, name)
        if leaf == "weight":
            self._fill_linear(key, path)
        return None  # a linear layer's bias is taken along with its weight

    def _fill_plain(self, key: str, name: str) -> None:
        if is_prequantized(key, self.shards):
            raise BaseModelError(f"model: {self.folder}: {key!r} is stored in 4 bits, but only linear layers may be.")
        tensor = self.shards[key]
        expected = self.model.get_parameter(name)
        self._check(key, tensor, tuple(expected.shape))
        hashed = self.hasher.submit(self.fingerprint.add, name, [tensor])
        value = nn.Parameter(tensor.to(self.device, self.dtype), requires_grad=False)
        _set(self.model, name, value)
        hashed.result()

    def _fill_linear(self, key: str, path: str) -> None:
        skeleton: Any = self.model.get_submodule(path)
        bias = self._bias(key, path) if skeleton.bias is not None else None
        if is_prequantized(key, self.shards):
            layer = read(key, self.shards.__getitem__, self.shards, bias).to(self.device)
            stored: Iterable[Tensor] = [tensor for _, tensor in sorted(layer.named_parameters(recurse=False))]
            hashed = self.hasher.submit(self.fingerprint.add, f"{path}.weight", list(stored))
        else:
            tensor = self.shards[key]
            hashed = self.hasher.submit(self.fingerprint.add, f"{path}.weight", [tensor])
            layer = self._quantized(key, tensor, bias)
        if (layer.out_features, layer.in_features) != (skeleton.out_features, skeleton.in_features):
            raise BaseModelError(
                f"model: {self.folder}: {key!r} is {[layer.out_features, layer.in_features]}, "
                f"but config.json wants {[skeleton.out_features, skeleton.in_features]}."
            )
        _set(self.model, path, layer)
        hashed.result()

    def _quantized(self, key: str, tensor: Tensor, bias: Tensor | None) -> FrozenLinear:
        self._check_dtype(key, tensor)
        try:
            return self.quantizer.quantize(tensor.to(self.device, self.dtype), bias)
        except BaseModelError as error:
            raise BaseModelError(f"model: {self.folder}: {key!r}: {error}") from error

    def _bias(self, key: str, path: str) -> Tensor:
        bias_key = key.removesuffix("weight") + "bias"
        if bias_key not in self.shards:
            raise BaseModelError(f"model: {self.folder}: {bias_key!r} is missing. Fetch the folder again.")
        bias = self.shards[bias_key]
        self._check(bias_key, bias, tuple(self.model.get_parameter(f"{path}.bias").shape))
        self.fingerprint.add(f"{path}.bias", [bias])
        return bias.to(self.device, self.dtype)

    def _check(self, key: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
        self._check_dtype(key, tensor)
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


def _set(model: nn.Module, path: str, value: nn.Module | nn.Parameter) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)


def _generation_config(folder: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
