"""The adapter so that every reader means the same by it: the scale folded into B, one rank, no rsLoRA, no patterns.

What DoRA does to a matrix has full rank: it is written as the nearest LoRA, and how far that is away is told.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.adapters.init import principal
from qlora.adapters.inject import adapted
from qlora.adapters.peft_files import WEIGHTS
from qlora.adapters.plain_lora import Pairs, folded, largest_rank, padded, refuse_whole, targets_of, write_plain
from qlora.adapters.spectrum import factors
from qlora.errors import InputError
from qlora.exporters.export_source import ExportOptions, ExportSource, write_tokenizer


class PortableExporter:
    """Export target `portable`."""

    def write(self, trained: ExportSource, folder: Path, choice: ExportOptions) -> int:
        """Write the adapter's two files, alpha = rank, and copy the base's tokenizer; returns the tensors' bytes.

        InputError for a rank where there is nothing to approximate, or one that is none.
        """
        pairs = nearest(trained, choice) if trained.adapter.magnitudes else _exact(trained, choice)
        write_plain(folder, padded(pairs, largest_rank(pairs)), trained.adapter, targets_of([trained.adapter]))
        write_tokenizer(trained, folder)
        return (folder / WEIGHTS).stat().st_size


@dataclass(frozen=True)
class Shortened:
    """How far LoRA matrices are from the updates they stand for: |D - B A| / |D|, Frobenius."""

    rank: int
    error: float  # of the whole adapter
    worst: str  # the layer that is furthest away
    worst_error: float

    def __str__(self) -> str:
        return (
            f"DoRA written as the nearest LoRA of rank {self.rank}: {self.error:.2%} of the updates' norm is missing, "
            f"at most {self.worst_error:.2%} ({self.worst}); --rank takes more"
        )


def shortened(noted: Mapping[str, Mapping[str, Any]]) -> Shortened | None:
    """Sum up what `nearest` noted, path -> {rank, error, update} (norms); None if nothing was approximated."""
    if not noted:
        return None
    shares = {path: each["error"] / each["update"] if each["update"] else 0.0 for path, each in noted.items()}
    error, update = (sum(each[key] ** 2 for each in noted.values()) ** 0.5 for key in ("error", "update"))
    worst = max(shares, key=lambda path: shares[path])
    rank = max(each["rank"] for each in noted.values())
    return Shortened(rank, error / update if update else 0.0, worst, shares[worst])


def nearest(trained: ExportSource, choice: ExportOptions) -> dict[str, tuple[Tensor, Tensor]]:
    """A [R, I] and B [O, R] nearest to each update as it acts on the base that was trained on."""
    refuse_whole(trained.adapter)
    layers, pairs = adapted(trained.model), trained.adapter.pairs
    wanted = choice.rank or largest_rank(pairs)
    found = {}
    for number, path in enumerate(pairs):
        delta = layers[path].delta()
        rank = min(wanted, *delta.shape)
        right = principal(delta, rank, torch.Generator().manual_seed(number))
        left = delta @ right
        found[path] = factors(right.t().cpu(), left.cpu(), 1.0).pair(rank)
        whole, held = (float(each.square().sum(dtype=torch.float64)) for each in (delta, left))
        choice.shortened[path] = {"rank": rank, "error": max(0.0, whole - held) ** 0.5, "update": whole**0.5}
    return found


def _exact(trained: ExportSource, choice: ExportOptions) -> Pairs:
    if choice.rank is not None:
        raise InputError("--rank: this adapter is written exactly, whatever its rank. `qlora resize` makes it smaller.")
    return folded(trained.adapter)
