"""What an exporter reads: a trained adapter and its base; and the options it writes with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapters.peft_files import AdapterFile
from qlora.data.conversations.chat_template import Template
from qlora.exporters.served_files import ServedFiles
from qlora.quant import Quantizer

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class ExportSource:
    """An adapter, the files of its base, and how the run stored and computed that base."""

    adapter: AdapterFile
    base_folder: Path
    quantizer: Quantizer
    quantized: Mapping[str, Any]  # module paths that the run quantized
    compute_dtype: torch.dtype  # the run's, in which weights were quantized
    device: torch.device
    model: nn.Module  # the trained model
    tokenizer: Any | None  # if it has more tokens than the files it is from
    rows: Mapping[str, tuple[Tensor, Tensor]]  # path -> ids [N] and trained rows [N, I] of embedding or head
    template: Template | None = None  # chat template of training
    stop_tokens: tuple[str, ...] = ()  # tokens that end an answer
    stop_token_ids: tuple[int, ...] = ()
    served: ServedFiles | None = None  # tokenizer, chat templates and end tokens as servers need them

    @property
    def chat_template(self) -> str:
        """The chat template that is written, in Jinja; empty if there is none."""
        return self.served.chat_template if self.served else ""

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files with new tokens, the chat template of training, and generation_config.json."""
        served = self.served or ServedFiles(self.base_folder, self.base_folder, self.tokenizer)
        served.write(folder)


@dataclass(frozen=True)
class ExportOptions:
    """How an export is written, and what its exporter measures while it writes."""

    base: str  # dequantized | original
    dtype: torch.dtype  # of a merged model
    report: Report = lambda done, total: None
    rank: int | None = None  # of the LoRA nearest to DoRA
    storage: str = ""  # how a GGUF file stores matrices; empty: its default
    model_name: str = ""  # of the base, for files that hold a name
    lines: list[str] = field(default_factory=list)  # to show, about what was written instead of what was requested
    rounding: dict[str, Any] = field(default_factory=dict)  # path -> norms of rounding error and update
    approximation: dict[str, Any] = field(default_factory=dict)  # path -> rank, norms of missing part and update
