"""Adapter folders as PEFT writes them, with the PEFT model that wrote each; and read and fitted by qlora."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora.adapters import peft_files
from qlora.adapters.attach import attach
from qlora.adapters.fit_to_base import fit_to_base
from qlora.model.load_base import Base
from qlora.model.original_weights import iter_weights
from qlora.runs.load_run import read_verified_adapter
from qlora.utils.atomic_files import read_json, write_json
from support.adapted_models import load_base, load_plain

TRAINED = ("lora_", "modules_to_save", "trainable_tokens_delta")  # in names of parameters


def save_peft_adapter(base: Path, folder: Path, rows: int | None = None, **config: Any) -> Any:
    """Write a trained adapter of PEFT to `folder`; returns the model. rows: of the vocabulary, if it is changed."""
    model = load_plain(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **(settings | config))).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if any(part in name for part in TRAINED):
                value.add_(0.05 * torch.randn(value.shape))
    model.save_pretrained(folder)
    return model


def read_on(base: Base, folder: Path, log: Callable[[str], None] = lambda line: None) -> Base:
    """`base` with the adapter in `folder`, read, fitted and attached as the commands do."""
    file = read_verified_adapter(folder, log)
    file = fit_to_base(file, base.model, partial(iter_weights, base.folder.path), log)
    attach(base.model, file, base.manifest.sha256)
    return base


def read_dense(base: Path, folder: Path, log: Callable[[str], None] = lambda line: None) -> Base:
    """A float32 base with the adapter in `folder`."""
    return read_on(load_base(base, "dense"), folder, log)


def change_config(folder: Path, **fields: Any) -> Path:
    """Set fields of an adapter_config.json."""
    write_json(folder / peft_files.CONFIG, read_json(folder / peft_files.CONFIG) | fields)
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Write other tensors to an adapter folder."""
    path = folder / peft_files.WEIGHTS
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder
