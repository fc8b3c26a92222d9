"""Loading the frozen base model: built on `meta`, its weights streamed tensor by tensor into quantized layers."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora.distributed.processes import Processes
from qlora.model import Model
from qlora.model.buffers import persistent_buffers
from qlora.model.download import find_model
from qlora.model.dtypes import choose_dtype, dtype_name, stored_dtype
from qlora.model.fingerprint import BaseManifest
from qlora.model.host_table import keep_table_on_host
from qlora.model.layer_sharder import LayerSharder
from qlora.model.lean_attention import replace_attention
from qlora.model.lean_modules import replace_with_lean
from qlora.model.linear_layers import describe_left_out, layers_left_out
from qlora.model.meta_model import build_meta_model, read_config, read_tokenizer, stop_ids, unties_head
from qlora.model.model_folder import ModelFolder
from qlora.model.quantized_cache import DamagedEntry, QuantizedCache
from qlora.model.recurrent_mixers import isolate_recurrent_mixers
from qlora.model.rotary import replace_length_dependent_rotary
from qlora.model.weight_loader import LoadResult, LoadTarget, Report, WeightLoader
from qlora.quant import Quantizer
from qlora.quant.linear import FrozenLinear
from qlora.utils.devices import has_bfloat16


@dataclass(frozen=True)
class Base:
    """A frozen base model ready for adapters, with its tokenizer and its manifest."""

    model: nn.Module
    tokenizer: Any
    config: Any
    folder: ModelFolder
    manifest: BaseManifest
    dtype: torch.dtype  # of products; float16: what is stored, and all between them, is float32
    device: torch.device
    stop_token_ids: tuple[int, ...]  # that end an answer
    notes: tuple[str, ...] = ()  # lines about the cache, an untied head, and layers that are left out


def load(
    section: Model,
    quantizer: Quantizer,
    device: torch.device,
    on_host: Callable[[str], bool] = lambda path: False,
    report: Report = lambda done, total: None,
    processes: Processes | None = None,
) -> Base:
    """The base model of a recipe: linear layers of the decoder stored by `quantizer`, everything frozen on `device`.

    `on_host`: whether the linear layer at a path stays in host memory after it was quantized on the device.
    `processes`: ranks that load together; each tensor is read by one of them, and each keeps what its strategy needs.

    BaseModelError if the folder, its configuration or a tensor is missing or invalid.
    """
    folder = find_model(section.name, section.revision)
    config = read_config(folder.path)
    dtype = choose_dtype(section.dtype, config.get_text_config().dtype or config.dtype, has_bfloat16(device))
    tokenizer = read_tokenizer(folder.path)
    together = processes if processes and processes.loads_together else None
    target = LoadTarget(quantizer, stored_dtype(dtype), device, on_host, together)
    model, result, notes = _load_weights(
        folder.path, target, lambda: build_meta_model(config, target.dtype, section.attention, device), report
    )
    manifest = _manifest(folder, model, result, dtype)
    stop_token_ids = stop_ids(config, _read_json(folder.path / "generation_config.json"), tokenizer)
    notes = (*notes, *_notes(folder.path, model, result.ignored))
    return Base(model, tokenizer, config, folder, manifest, dtype, device, stop_token_ids, notes)


def _manifest(folder: ModelFolder, model: nn.Module, result: LoadResult, dtype: torch.dtype) -> BaseManifest:
    """How each matrix is stored, with the format and the second error of a decoded one, and all other tensors."""
    quantized = {
        path: layer.describe() | dict(result.decoded.get(path, {}))
        for path, layer in model.named_modules()
        if isinstance(layer, FrozenLinear)
    }
    return BaseManifest(
        folder.name,
        folder.revision,
        result.sha256,
        dtype_name(dtype),
        quantized,
        result.ignored,
        layers_left_out(model),
        _kept(model),
    )


def _kept(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters and stored buffers that are no quantized matrix: they keep the dtype of the class."""
    tensors = {**dict(model.named_parameters()), **persistent_buffers(model)}
    frozen = {path for path, layer in model.named_modules() if isinstance(layer, FrozenLinear)}
    return tuple(name for name in tensors if name.rpartition(".")[0] not in frozen)


def _load_weights(
    folder: Path, target: LoadTarget, build: Callable[[], nn.Module], report: Report
) -> tuple[nn.Module, LoadResult, tuple[str, ...]]:
    """The model with its weights, from a valid cache entry or else from the checkpoint, with notes on the cache."""
    notes, model = list[str](), build()
    sharder = LayerSharder(model, target.processes, target.on_host) if target.processes else None
    cache = QuantizedCache(folder, target, sharder)
    try:
        cached = cache.load(model, report)
        if cached:
            return _finish(model, target, sharder), cached, ("read quantized from the cache of an earlier start",)
    except DamagedEntry as error:
        notes.append(f"the cached base does not verify ({error}); reading the checkpoint")
        cache.remove()
        model = build()
        sharder = LayerSharder(model, target.processes, target.on_host) if target.processes else None
    result = WeightLoader(model, folder, target, sharder).run(report)
    note = cache.save(model, result)
    return _finish(model, target, sharder), result, (*notes, *([note] if note else []))


def _finish(model: nn.Module, target: LoadTarget, sharder: LayerSharder | None) -> nn.Module:
    """The loaded model with the modules that replace its class's own, and sharded outside its layers too."""
    replace_with_lean(model)
    if target.device.type == "cuda":
        replace_attention(model)
        keep_table_on_host(model)
    replace_length_dependent_rotary(model)
    isolate_recurrent_mixers(model)
    if sharder:
        sharder.shard_rest()
    return model


def _notes(folder: Path, model: Any, ignored: Sequence[str]) -> Iterator[str]:
    """Lines on where this base differs from its config.json, and on what is not quantized or not read."""
    if unties_head(folder):
        yield (
            "config.json ties the head to the embedding, but the files hold another head, "
            "which is used (as transformers 5 does)"
        )
    left_out = describe_left_out(model)
    if left_out:
        yield left_out
    if ignored:
        groups = Counter(key.removeprefix("model.").partition(".")[0] for key in ignored)
        listed = ", ".join(f"{name} ({count})" for name, count in groups.most_common(3))
        yield f"{len(ignored)} tensors of the checkpoint are not part of the text model: {listed}; a merge copies them"


def _read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty if the file is missing or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
