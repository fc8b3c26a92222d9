"""The frozen base, ready to be adapted: its skeleton on meta, its weights streamed tensor by tensor into layers."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora.distributed.processes import Processes
from qlora.model import Model
from qlora.model.download import ModelFolder, find
from qlora.model.dtypes import choose, has_bfloat16, name_of
from qlora.model.fingerprint import BaseManifest
from qlora.model.lean_modules import lean
from qlora.model.meta_model import build, read_config, read_tokenizer, stop_ids
from qlora.model.module_tree import LayerSharder
from qlora.model.quantized_cache import Damaged, QuantizedCache
from qlora.model.weight_loader import LoadResult, LoadTarget, Quantizer, Report, WeightLoader
from qlora.quant.linear import FrozenLinear


@dataclass(frozen=True)
class Base:
    """A frozen model ready to be adapted, with its tokenizer and the manifest of what it is."""

    model: nn.Module
    tokenizer: Any
    config: Any
    folder: ModelFolder
    manifest: BaseManifest
    dtype: torch.dtype
    device: torch.device
    stops: tuple[int, ...]  # token ids that end an answer
    notes: tuple[str, ...] = ()  # where it was read from, and where it is kept


def load(
    section: Model,
    quantizer: Quantizer,
    device: torch.device,
    on_host: Callable[[str], bool] = lambda path: False,
    report: Report = lambda done, total: None,
    processes: Processes | None = None,
) -> Base:
    """The base of a recipe, its decoder's linear layers stored by `quantizer`, everything frozen on `device`.

    `on_host`: whether the linear layer at a path stays in main memory, once it was quantised on the device.
    `processes`: several read together, each tensor once, and keep what their strategy has them hold.

    BaseModelError if the folder, its configuration or one of its tensors is not what is needed.
    """
    folder = find(section.name, section.revision)
    config = read_config(folder.path)
    dtype = choose(section.dtype, config.get_text_config().dtype or config.dtype, has_bfloat16(device))
    tokenizer = read_tokenizer(folder.path)
    aim = LoadTarget(quantizer, dtype, device, on_host, processes if processes and processes.together else None)
    model, known, notes = _filled(folder.path, aim, lambda: build(config, dtype, section.attention, device), report)
    quantized = {path: layer.describe() for path, layer in model.named_modules() if isinstance(layer, FrozenLinear)}
    manifest = BaseManifest(folder.name, folder.revision, known.sha256, name_of(dtype), quantized, known.ignored)
    stops = stop_ids(config, _generation_config(folder.path), tokenizer)
    return Base(model, tokenizer, config, folder, manifest, dtype, device, stops, notes)


def _filled(
    folder: Path, aim: LoadTarget, build: Callable[[], nn.Module], report: Report
) -> tuple[nn.Module, LoadResult, tuple[str, ...]]:
    """The model with its weights: kept ones where there are any that verify, else from the original files."""
    notes, model = list[str](), build()
    sharing = LayerSharder(model, aim.processes, aim.on_host) if aim.processes else None
    packed = QuantizedCache(folder, aim, sharing)
    try:
        known = packed.recall(model, report)
        if known:
            return _finished(model, sharing), known, ("read quantised, as an earlier start kept it",)
    except Damaged as error:
        notes.append(f"the kept base does not verify ({error}); reading the original")
        packed.forget()
        model = build()
        sharing = LayerSharder(model, aim.processes, aim.on_host) if aim.processes else None
    known = WeightLoader(model, folder, aim, sharing).run(report)
    kept = packed.keep(model, known)
    return _finished(model, sharing), known, (*notes, *([kept] if kept else []))


def _finished(model: nn.Module, sharing: LayerSharder | None) -> nn.Module:
    """The filled model with lean modules, and what stands outside its layers shared out too."""
    lean(model)
    if sharing:
        sharing.finish_rest()
    return model


def _generation_config(folder: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
