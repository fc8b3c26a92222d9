"""Export target `portable`: a plain LoRA that every reader understands; scaling folded into B, one rank, no patterns.

Its names are those of the class that servers build. What DoRA does to a matrix has full rank: it is written as the
nearest LoRA, and the error is reported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.adapters.init import principal_directions
from qlora.adapters.inject import adapted
from qlora.adapters.peft_files import WEIGHTS
from qlora.adapters.plain_lora import (
    Pairs,
    fold_scaling,
    joint_targets,
    largest_rank,
    refuse_base_weights,
    write_plain_lora,
)
from qlora.adapters.spectrum import factors
from qlora.errors import InputError
from qlora.exporters.export_source import ExportOptions, ExportSource
from qlora.exporters.served_names import refuse_unmatched, served_class, with_names_of


class PortableExporter:
    """Writes a plain LoRA, alpha = rank."""

    def write(self, source: ExportSource, folder: Path, options: ExportOptions) -> int:
        """Write the adapter's two files and copy the base's tokenizer; returns the bytes of the tensors' file.

        InputError for --rank where nothing is approximated; AdapterError for weights that no LoRA can represent, or
        that match no module of the class that servers build.
        """
        pairs = nearest_lora(source, options) if source.adapter.magnitudes else _exact_lora(source, options)
        served = served_class(source.base_folder)
        plain = replace(source.adapter, pairs=pairs, magnitudes={})
        renamed = with_names_of(served, source.model, plain)
        write_plain_lora(folder, renamed.pairs, renamed, joint_targets([renamed]))
        refuse_unmatched(folder, served)
        source.write_tokenizer(folder)
        return (folder / WEIGHTS).stat().st_size


@dataclass(frozen=True)
class LowRankApproximation:
    """How far LoRA matrices are from the updates they approximate: |D - B A| / |D|, Frobenius."""

    rank: int
    error: float  # of the whole adapter
    worst: str  # the layer with the largest error
    worst_error: float

    def __str__(self) -> str:
        return (
            f"DoRA written as the nearest LoRA of rank {self.rank}: {self.error:.2%} of the updates' norm is missing, "
            f"at most {self.worst_error:.2%} ({self.worst}); a higher --rank loses less"
        )


def summarize_approximation(layers: Mapping[str, Mapping[str, Any]]) -> LowRankApproximation | None:
    """Sum up what `nearest_lora` measured, path -> {rank, error, update} (norms); None if nothing was approximated."""
    if not layers:
        return None
    shares = {path: norms["error"] / norms["update"] if norms["update"] else 0.0 for path, norms in layers.items()}
    error, update = (sum(norms[key] ** 2 for norms in layers.values()) ** 0.5 for key in ("error", "update"))
    worst = max(shares, key=lambda path: shares[path])
    rank = max(norms["rank"] for norms in layers.values())
    return LowRankApproximation(rank, error / update if update else 0.0, worst, shares[worst])


def nearest_lora(source: ExportSource, options: ExportOptions) -> dict[str, tuple[Tensor, Tensor]]:
    """A [R, I] and B [O, R] nearest to the update of each layer on the base it was trained on."""
    refuse_base_weights(source.adapter)
    layers, adapter_pairs = adapted(source.model), source.adapter.pairs
    requested = options.rank or largest_rank(adapter_pairs)
    pairs = {}
    for number, path in enumerate(adapter_pairs):
        delta = layers[path].delta()
        rank = min(requested, *delta.shape)
        right = principal_directions(delta, rank, torch.Generator().manual_seed(number))
        left = delta @ right
        pairs[path] = factors(right.t().cpu(), left.cpu(), 1.0).pair(rank)
        total, kept = (float(matrix.square().sum(dtype=torch.float64)) for matrix in (delta, left))
        norms = {"rank": rank, "error": max(0.0, total - kept) ** 0.5, "update": total**0.5}
        options.approximation[path] = norms
    return pairs


def _exact_lora(source: ExportSource, options: ExportOptions) -> Pairs:
    if options.rank is not None:
        raise InputError("--rank: this adapter is written exactly, whatever its rank. `qlora resize` makes it smaller.")
    return fold_scaling(source.adapter)
