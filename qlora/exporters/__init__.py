"""Exports: a trained run in the formats that other programs load. Here: the table of targets, and a request.

`cli/` and `api.py` take their defaults from here, so this file imports no torch.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from qlora.errors import InputError, did_you_mean
from qlora.exporters.gguf import FEW_BITS, K_QUANTS, MISSING, STORAGES, check_checkout
from qlora.runs.artifacts import NO_ADAPTER
from qlora.utils.atomic_folders import require_new_folder
from qlora.utils.registry import Registry

TARGETS = Registry(
    "export --to",
    merged="qlora.exporters.merged:MergedExporter",  # one model: base + update, summed in float32, rounded once
    adapter="qlora.exporters.adapter:AdapterExporter",  # PEFT's folder
    portable="qlora.exporters.portable:PortableExporter",  # a PEFT folder for readers without rsLoRA and patterns
    mlx="qlora.exporters.mlx:MlxExporter",  # an adapter in mlx-lm's format
    gguf="qlora.exporters.gguf.gguf:GgufExporter",  # one file for llama.cpp
    **{"gguf-adapter": "qlora.exporters.gguf.gguf_adapter:GgufAdapterExporter"},  # a LoRA for a base in GGUF
    ollama="qlora.exporters.ollama:OllamaExporter",  # a merged model and its Modelfile
)
FULL_MODELS = ("merged", "ollama")  # targets that are full models: these get a certificate
WHOLE_MODELS = (*FULL_MODELS, "gguf")  # with those that are one file
ADAPTERS = ("adapter", "portable", "mlx")  # targets that are an adapter in files of its own, which is read back
GGUF_TARGETS = ("gguf", "gguf-adapter")
DTYPES = ("bfloat16", "float16", "float32")  # of a merged model
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
    llama_cpp: str | None = None  # a checkout of llama.cpp, whose programs write the file of `gguf`

    def check(self, folder: Path) -> None:
        """InputError for an unknown word, options that contradict each other, or a folder that can't be written."""
        if self.to not in TARGETS:
            raise InputError(f"--to: no {self.to!r}.{did_you_mean(self.to, TARGETS)}")
        if self.base not in MERGE_BASES:
            raise InputError(f"--base: no {self.base!r}.{did_you_mean(self.base, MERGE_BASES)}")
        if self.dtype is not None and self.dtype not in self.dtypes:
            raise InputError(f"--dtype: no {self.dtype!r} for --to {self.to}.{did_you_mean(self.dtype, self.dtypes)}")
        self._check_gguf()
        if self.rank is not None and (self.to != "portable" or self.rank < 1):
            raise InputError(f"--rank: found {self.rank} for --to {self.to}, allowed: from 1, for --to portable.")
        require_new_folder(folder)

    @property
    def kl_limit(self) -> float | None:
        """The highest mean KL of a written model: --max-kl, or MAX_KL on the dequantized base; None: no limit.

        On the original base the quantization error is missing, and storages of few bits have an error of their own:
        the KL of these is reported only.
        """
        has_default = self.base == MERGE_BASE and self.dtype not in FEW_BITS
        return MAX_KL if self.max_kl is None and has_default else self.max_kl

    @property
    def unused(self) -> list[str]:
        """Options that were set and have no effect here: an adapter is written in float32, and without its base."""
        if self.to in WHOLE_MODELS:
            return []
        values = {"--dtype": self.dtype not in (None, "float32"), "--base": self.base != MERGE_BASE}
        return [option for option, is_set in values.items() if is_set]

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The words of --dtype for this target; K-quants are written by llama.cpp's own program."""
        if self.to != "gguf":
            return DTYPES
        return (*STORAGES, *K_QUANTS) if self.llama_cpp else STORAGES

    def _check_gguf(self) -> None:
        """InputError for --llama-cpp where it can't be used, and for a missing package."""
        if self.llama_cpp is not None:
            if self.to != "gguf":
                raise InputError(f"--llama-cpp: it is for --to gguf, found --to {self.to}.")
            check_checkout(Path(self.llama_cpp), self.dtype)
        if self.to in GGUF_TARGETS and find_spec("gguf") is None:
            raise InputError(f"--to {self.to} {MISSING}")

    def check_source(self, has_adapter: bool, kind: str) -> None:
        """InputError for a model without an adapter, or a target that needs one. kind: `adapter.kind` of the recipe."""
        if has_adapter:
            return
        if kind != "full":
            raise InputError(
                "export: this is a model without an adapter; there is nothing to export. Name a run's folder."
            )
        if self.to not in WHOLE_MODELS:
            raise InputError(f"--to {self.to}: {NO_ADAPTER} Use --to merged, --to gguf or --to ollama.")
