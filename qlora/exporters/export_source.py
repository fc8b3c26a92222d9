"""A trained adapter and its base as the export targets see them, and what a user chooses about an export."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapters.peft_files import AdapterFile
from qlora.data.conversations.chat_template import Template
from qlora.model.download import tokenizer_files
from qlora.model.new_tokens import save_tokenizer
from qlora.model.weight_loader import Quantizer
from qlora.utils.atomic_files import write_bytes

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class ExportSource:
    """An adapter, the files of its base, and how the run stored and computed that base."""

    adapter: AdapterFile
    base: Path
    quantizer: Quantizer
    quantized: Mapping[str, Any]  # module paths that the run quantised
    compute: torch.dtype  # what the run computed in, and quantised from
    device: torch.device
    model: nn.Module  # the trained model itself, as it answers
    tokenizer: Any | None  # where it has tokens more than the base's files
    rows: Mapping[str, tuple[Tensor, Tensor]]  # path -> ids [N] and rows [N, I] of embedding or head that trained
    template: Template | None = None  # how conversations are written
    stops: tuple[str, ...] = ()  # tokens that end an answer


def write_tokenizer(trained: ExportSource, folder: Path) -> None:
    """The base's tokenizer files byte for byte, or those of one that has grown."""
    if trained.tokenizer is not None:
        save_tokenizer(trained.tokenizer, folder)
        return
    for file in tokenizer_files(trained.base):
        write_bytes(folder / file.name, file.read_bytes())


@dataclass(frozen=True)
class ExportOptions:
    """What a user says about an export."""

    onto: str = "dequantized"  # dequantized | original
    dtype: torch.dtype = torch.bfloat16  # of a merged model
    report: Report = lambda done, total: None
    rank: int | None = None  # of the LoRA that stands for DoRA
    rounding: dict[str, Any] = field(default_factory=dict)  # path -> what storing in `dtype` did to the update
    shortened: dict[str, Any] = field(default_factory=dict)  # path -> what a lower rank than the update's left out
