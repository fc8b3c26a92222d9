"""`--llama-cpp DIR`: a model written by the converter of a user's llama.cpp, and by its llama-quantize for K-quants."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from qlora.errors import QloraError
from qlora.exporters.export_source import ExportOptions, ExportSource
from qlora.exporters.gguf import DEFAULT_STORAGE, MODEL_FILE, SCRIPT, quantizer_of
from qlora.exporters.merged import MergedExporter

OUT_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "q8_0": "q8_0"}  # of the script
LAST_LINES = 3  # of a program's errors that are shown


class CheckoutExporter:
    """Writes MODEL_FILE with the programs of a checkout."""

    def __init__(self, checkout: Path) -> None:
        self._checkout = checkout

    def write(self, source: ExportSource, folder: Path, options: ExportOptions) -> int:
        """Write the file; returns its bytes. QloraError, with its last lines, if a program of the checkout fails.

        The merged model is written beside it for the script, and removed at the end.
        """
        storage, merged = options.storage or DEFAULT_STORAGE, folder / "merged"
        merged.mkdir()
        MergedExporter().write(source, merged, replace(options, dtype=_merged_dtype(storage)))
        first = folder / MODEL_FILE if storage in OUT_TYPES else folder / "unquantized.gguf"
        name = Path(options.model_name or "model").name
        script = [sys.executable, str(self._checkout / SCRIPT), str(merged), "--outfile", str(first)]
        _run([*script, "--model-name", name, "--outtype", OUT_TYPES.get(storage, "f16")])
        shutil.rmtree(merged)
        if storage not in OUT_TYPES:
            _run([str(quantizer_of(self._checkout)), str(first), str(folder / MODEL_FILE), storage.upper()])
            first.unlink()
        return (folder / MODEL_FILE).stat().st_size


def _merged_dtype(storage: str) -> torch.dtype:
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(storage, torch.float32)


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()][-LAST_LINES:]
        program = next(Path(part).name for part in command if part != sys.executable)
        raise QloraError(
            f"--llama-cpp: {program} failed (exit code {result.returncode}): {' | '.join(lines)}. Install the "
            "checkout's requirements.txt into this environment, or update the checkout."
        )
