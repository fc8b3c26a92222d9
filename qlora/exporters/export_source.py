"""What an exporter reads: a trained adapter and its base; and the options it writes with."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapters.peft_files import AdapterFile
from qlora.data.conversations.chat_template import Template
from qlora.model.new_tokens import write_tokenizer
from qlora.quant import Quantizer
from qlora.utils.atomic_files import write_text

CHAT_TEMPLATE = "chat_template.jinja"  # transformers reads it in place of the one in tokenizer_config.json
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
    tokenizer_folder: Path | None = None  # with the tokenizer's files, if they are not the base's
    other_chat_template: str | None = None  # of training, if it is not the tokenizer's own

    def write_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer's files, or save the tokenizer with its new tokens; with the chat template of training."""
        write_tokenizer(folder, self.tokenizer_folder or self.base_folder, self.tokenizer)
        if self.other_chat_template is not None:
            write_text(folder / CHAT_TEMPLATE, self.other_chat_template)


@dataclass(frozen=True)
class ExportOptions:
    """How an export is written, and what its exporter measures while it writes."""

    base: str  # dequantized | original
    dtype: torch.dtype  # of a merged model
    report: Report = lambda done, total: None
    rank: int | None = None  # of the LoRA nearest to DoRA
    rounding: dict[str, Any] = field(default_factory=dict)  # path -> norms of rounding error and update
    approximation: dict[str, Any] = field(default_factory=dict)  # path -> rank, norms of missing part and update


def with_default_arguments(template: str, values: Mapping[str, Any]) -> str:
    """The template, in which variables that a server does not pass have the values of training."""
    # The empty expression at the end keeps a line end with which the template begins.
    lines = [
        f"{{% if {name} is not defined %}}{{% set {name} = {json.dumps(value)} %}}{{% endif %}}{{{{ '' }}}}"
        for name, value in values.items()
    ]
    return "".join(lines) + template
