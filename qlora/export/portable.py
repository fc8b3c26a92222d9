"""The adapter so that every reader means the same by it: the scale folded into B, one rank, no rsLoRA, no patterns."""

from pathlib import Path

from qlora.adapters.folder import folded, largest_rank, padded, targets_of, write_plain
from qlora.adapters.weights import WEIGHTS
from qlora.base.folder import tokenizer_files
from qlora.export.trained import Choice, Trained
from qlora.files import write_bytes


class Portable:
    """Export target `portable`."""

    def write(self, trained: Trained, folder: Path, choice: Choice) -> int:
        """Write the adapter's two files, alpha = rank, and copy the base's tokenizer; returns the tensors' bytes."""
        pairs = folded(trained.adapter)
        write_plain(folder, padded(pairs, largest_rank(pairs)), trained.adapter, targets_of([trained.adapter]))
        for file in tokenizer_files(trained.base):
            write_bytes(folder / file.name, file.read_bytes())
        return (folder / WEIGHTS).stat().st_size
