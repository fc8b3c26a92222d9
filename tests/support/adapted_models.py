"""Tiny bases with adapters: a base frozen by a quantizer, an adapter far from its start, logits, PEFT's identity."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora.adapters import ADAPTERS, peft_files
from qlora.adapters.dora import DoraLinear
from qlora.adapters.inject import adapted, inject
from qlora.model import Model
from qlora.model.load_base import Base, load
from qlora.quant import Quant, build_quantizer
from qlora.quant.linear import FrozenLinear

IDS = torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(0))


def load_base(folder: Path, quantizer: str = "nf4", dtype: str = "float32") -> Base:
    return load(Model(name=str(folder), dtype=dtype), build_quantizer(Quant(kind=quantizer)), torch.device("cpu"))


def freeze(weight: Tensor, bias: Tensor | None = None, quantizer: str = "dense") -> FrozenLinear:
    return build_quantizer(Quant(kind=quantizer)).quantize(weight, bias)


def load_plain(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits


def build_adapter(kind: str = "lora", rank: int = 4, alpha: float = 6.0, dropout: float = 0.0) -> Any:
    return ADAPTERS[kind](rank=rank, alpha=alpha, dropout=dropout)


def inject_trained(base: Base, kind: str, targets: Any = "all-linear", seed: int = 0, **options: Any) -> Any:
    """Put an adapter on the base whose tensors are all far from where they start; returns its settings."""
    adapter = build_adapter(kind, **options)
    inject(base.model, adapter, targets, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for layer in adapted(base.model).values():
            layer.B.copy_(torch.randn(layer.B.shape, generator=generator) * 0.1)
            if isinstance(layer, DoraLinear):
                layer.magnitude.mul_(1 + 0.2 * torch.randn(layer.magnitude.shape, generator=generator))
    base.model.eval()
    return adapter


def identity_of(base: Base) -> peft_files.BaseIdentity:
    return peft_files.BaseIdentity(base.manifest.name, base.manifest.revision, base.manifest.sha256)


def randomize_adapter(model: nn.Module) -> None:
    """B and magnitudes of every adapted layer far from where they start, the same for every call."""
    for number, layer in enumerate(adapted(model).values()):
        nn.init.normal_(layer.B, std=0.1, generator=torch.Generator().manual_seed(number))
        if isinstance(layer, DoraLinear):
            layer.magnitude.data *= torch.linspace(0.5, 1.5, len(layer.magnitude))
