"""Export target `gguf-adapter`: the LoRA alone as GGUF, for a base that is a GGUF file.

llama.cpp adds alpha / rank * B A. The adapter's scaling is folded into B and alpha is the rank, so that rsLoRA and
patterns are kept; rows of B lie as the rows of the base's matrix do.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qlora.adapters.plain_lora import fold_scaling
from qlora.errors import AdapterError, InputError, QloraError
from qlora.exporters.export_source import ExportOptions, ExportSource
from qlora.exporters.gguf import ADAPTER_FILE
from qlora.exporters.gguf.gguf_architectures import Architecture, architecture_of
from qlora.exporters.gguf.gguf_file import GgufFile, PlannedGguf, Value, write_gguf
from qlora.exporters.gguf.tensor_layout import Placement, placements_by_source

ALPHA = "adapter.lora.alpha"
SIDES = (".lora_a", ".lora_b")


class GgufAdapterExporter:
    """Writes one file, ADAPTER_FILE."""

    def write(self, source: ExportSource, folder: Path, options: ExportOptions) -> int:
        """Write the file in float32 and read it back; returns the bytes of its tensors.

        AdapterError for what is no plain LoRA (DoRA, new tokens, whole modules); InputError for an architecture or a
        matrix that llama.cpp has no form for; QloraError if the file does not hold the updates.
        """
        architecture = architecture_of(source.model)
        pairs = fold_scaling(source.adapter)
        places = places_of_pairs(architecture, source.model, pairs)
        rank = max(len(a) for a, _ in pairs.values())
        tensors = [tensor for path, place in places.items() for tensor in _planned(path, place, pairs[path], rank)]
        metadata: dict[str, Value] = {
            "general.type": "adapter",
            "general.name": Path(options.model_name or "model").name,
            "adapter.type": "lora",
            ALPHA: float(rank),
        }
        size = write_gguf(folder / ADAPTER_FILE, architecture.name, metadata, tensors, options.report)
        check_adapter_file(GgufFile(folder / ADAPTER_FILE), places, pairs)
        return size


def places_of_pairs(
    architecture: Architecture, model: object, pairs: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Placement]:
    """Path of an adapted matrix -> its tensor in the base's file. InputError for a matrix that is a part of one."""
    known = placements_by_source(architecture, model)
    places = {}
    for path in pairs:
        holders = known.get(f"{path}.weight", [])
        if len(holders) != 1 or holders[0].is_stack:
            raise InputError(
                f"--to gguf-adapter: llama.cpp adds no LoRA to {path}, which is a part of a tensor in its files. "
                "Use --to gguf."
            )
        places[path] = holders[0]
    return places


def check_adapter_file(
    file: GgufFile, places: Mapping[str, Placement], pairs: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """QloraError unless the file's tensors, its alpha and its layout undone, are the updates to float32's rounding."""
    alpha = float(file.get(ALPHA, 0.0))
    for path, place in places.items():
        a, b = (file.values(place.name + side) for side in SIDES)
        actual = place.undo(b) @ a * (alpha / len(a))
        expected = pairs[path][1].float().cpu() @ pairs[path][0].float().cpu()
        if actual.shape != expected.shape or not torch.allclose(actual, expected, rtol=1e-4, atol=1e-6):
            raise QloraError(f"{file.path}: {place.name} is not the update of {path}; nothing was exported.")
    unknown = file.tensors.keys() - {place.name + side for place in places.values() for side in SIDES}
    if unknown:
        raise QloraError(f"{file.path}: {min(unknown)} belongs to no matrix of the adapter; nothing was exported.")


def _planned(path: str, place: Placement, pair: tuple[Tensor, Tensor], rank: int) -> list[PlannedGguf]:
    """A and B of one matrix; llama.cpp scales by alpha / rank of each matrix, which B makes up for."""
    a, b = pair[0].float().cpu(), place.change(pair[1].float().cpu() * (len(pair[0]) / rank))
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AdapterError(f"{path} has a value that is not finite; nothing was written.")
    return [
        PlannedGguf(place.name + side, tuple(values.shape), "float32", lambda values=values: values)  # type: ignore[misc]
        for side, values in zip(SIDES, (a, b), strict=True)
    ]
