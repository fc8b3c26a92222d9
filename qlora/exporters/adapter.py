"""Export target `adapter`: PEFT's folder, with the tokenizer.

An adapter of another tool that was changed to fit its base (a start that changed the base, other names) is written
anew, so that any reader of PEFT's format computes the same.
"""

from pathlib import Path

from qlora.adapters.peft_files import CONFIG, WEIGHTS, write_file
from qlora.exporters.export_source import ExportOptions, ExportSource
from qlora.exporters.served_names import reader_class, refuse_unmatched
from qlora.utils.atomic_files import write_bytes


class AdapterExporter:
    """Copies the adapter, or writes what fits its base."""

    def write(self, source: ExportSource, folder: Path, options: ExportOptions) -> int:
        """Write the adapter's two files, its model card and the tokenizer; returns the tensor file's bytes.

        AdapterError if a tensor matches no module of the class that PEFT adds it to.
        """
        adapter = source.adapter.folder
        copied = ["README.md"] if source.adapter.is_changed else ["README.md", WEIGHTS, CONFIG]
        for file in (adapter / name for name in copied):
            if file.is_file():
                write_bytes(folder / file.name, file.read_bytes())
        if source.adapter.is_changed:
            write_file(folder, source.adapter)
        refuse_unmatched(folder, reader_class(source.base_folder))
        source.write_tokenizer(folder)
        return (folder / WEIGHTS).stat().st_size
