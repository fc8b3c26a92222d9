"""Export target `adapter`: PEFT's folder, with the tokenizer."""

from pathlib import Path

from qlora.adapters.peft_files import CONFIG, WEIGHTS
from qlora.exporters.export_source import ExportOptions, ExportSource
from qlora.utils.atomic_files import write_bytes


class AdapterExporter:
    """Copies the adapter."""

    def write(self, source: ExportSource, folder: Path, options: ExportOptions) -> int:
        """Copy the adapter's two files, its model card and the base's tokenizer; returns the tensor file's bytes."""
        adapter = source.adapter.folder
        for file in (adapter / WEIGHTS, adapter / CONFIG, adapter / "README.md"):
            if file.is_file():
                write_bytes(folder / file.name, file.read_bytes())
        source.write_tokenizer(folder)
        return (adapter / WEIGHTS).stat().st_size
