"""GGUF, the file format of llama.cpp and Ollama: models and LoRA adapters, written here and measured as written.

Facts of llama.cpp are those of b11669 and of its converter in llama-cpp-python 0.3.36 (2026). This file imports nothing
heavy: `qlora --help` and the checks of an export read it.
"""

from pathlib import Path
from typing import Final

from qlora.errors import InputError

STORAGES: Final = ("float32", "float16", "bfloat16", "q8_0", "q4_0")  # how the matrices of a file are stored
K_QUANTS: Final = ("q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")  # by llama-quantize only
MISSING: Final = "needs the package gguf: pip install gguf"
DEFAULT_STORAGE: Final = "float16"
MODEL_FILE: Final = "model.gguf"
ADAPTER_FILE: Final = "adapter.gguf"
FEW_BITS: Final = ("q4_0", *K_QUANTS)  # so far from the trained model that there is no default limit
SCRIPT: Final = "convert_hf_to_gguf.py"  # llama.cpp's converter
QUANTIZE: Final = ("build/bin/llama-quantize", "bin/llama-quantize", "llama-quantize")


def quantizer_of(checkout: Path) -> Path | None:
    """llama-quantize, if it is built there."""
    return next((checkout / name for name in QUANTIZE if (checkout / name).is_file()), None)


def check_checkout(checkout: Path, storage: str | None) -> None:
    """InputError if the script, or the program that this storage takes, is not there."""
    if not (checkout / SCRIPT).is_file():
        raise InputError(f"--llama-cpp: {checkout} has no {SCRIPT}. Name a checkout of llama.cpp.")
    if storage in (*K_QUANTS, "q4_0") and quantizer_of(checkout) is None:
        raise InputError(
            f"--dtype {storage}: {checkout} has no llama-quantize ({', '.join(QUANTIZE)}). Build it: "
            "cmake -B build && cmake --build build --target llama-quantize."
        )
