"""The adapter by itself: a folder that PEFT and the servers take as it is."""

from pathlib import Path

from qlora.adapters.peft_files import CONFIG, WEIGHTS
from qlora.exporters.export_source import ExportOptions, ExportSource, write_tokenizer
from qlora.utils.atomic_files import write_bytes


class AdapterExporter:
    """Export target `adapter`."""

    def write(self, trained: ExportSource, folder: Path, choice: ExportOptions) -> int:
        """Copy the adapter's two files, its card and the base's tokenizer; returns the bytes of the tensors' file."""
        source = trained.adapter.folder
        for file in (source / WEIGHTS, source / CONFIG, source / "README.md"):
            if file.is_file():
                write_bytes(folder / file.name, file.read_bytes())
        write_tokenizer(trained, folder)
        return (source / WEIGHTS).stat().st_size
