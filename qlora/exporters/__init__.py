"""Exports: a trained run in the formats that other programs load. Here: the table of targets, and a request.

`cli/` and `api.py` take their defaults from here, so this file imports no torch.
"""

from dataclasses import dataclass
from typing import Final

from qlora.utils.registry import Registry

TARGETS = Registry(
    "export --to",
    merged="qlora.exporters.merged:MergedExporter",  # one model: base + update, summed in float32, rounded once
    adapter="qlora.exporters.adapter:AdapterExporter",  # PEFT's folder
    portable="qlora.exporters.portable:PortableExporter",  # a PEFT folder for readers without rsLoRA and patterns
    ollama="qlora.exporters.ollama:OllamaExporter",  # a merged model and its Modelfile
)
MERGE_BASE: Final = "dequantized"  # what an update is added to by default: the weights that training used
MERGE_BASES = (MERGE_BASE, "original")  # or the 16-bit weights before quantization
MAX_KL = 0.05  # nats per token, on the dequantized base; on the original one there is no default limit
MAX_LOST = 1.0  # rounding error over the update: above it, rounding changed the weights more than training did


@dataclass(frozen=True)
class ExportRequest:
    """The options of `qlora export`."""

    to: str
    base: str = MERGE_BASE
    dtype: str | None = None  # None: the run's compute dtype
    data: str | None = None  # examples of the certificate; None: the run's held-out ones
    rows: int | None = None  # how many of them; 0: no certificate
    max_kl: float | None = None  # None: MAX_KL on the dequantized base
    max_lost: float = MAX_LOST
    rank: int | None = None  # of the LoRA nearest to DoRA; None: the adapter's rank
