"""A merged model for Ollama: the folder and a Modelfile with the chat template of training and its stop tokens."""

from pathlib import Path

from qlora.exporters.export_source import ExportOptions, ExportSource
from qlora.exporters.go_template import GoTemplate, Untranslatable, translate
from qlora.exporters.merged import MergedExporter
from qlora.utils.atomic_files import write_text

MODELFILE = "Modelfile"


class OllamaExporter:
    """Export target `ollama`."""

    def write(self, trained: ExportSource, folder: Path, choice: ExportOptions) -> int:
        """Write the merged model and its Modelfile; returns the bytes of the tensors."""
        size = MergedExporter().write(trained, folder, choice)
        write_text(folder / MODELFILE, modelfile(trained))
        return size


def modelfile(trained: ExportSource) -> str:
    """The Modelfile: FROM this folder, TEMPLATE where Ollama's language can say it, a stop for each end token."""
    lines = ["FROM ."]
    try:
        found: GoTemplate = translate(trained.template) if trained.template else _none()
        lines.append(f'TEMPLATE """{found.text}"""')
        if found.system:
            lines.append(f'SYSTEM """{found.system}"""')
    except Untranslatable as error:
        lines.append(f"# No TEMPLATE: {error}. Ollama falls back on the one it finds in the model.")
    lines += [f'PARAMETER stop "{_quoted(stop)}"' for stop in trained.stops]
    return "\n".join([*lines, ""])


def _none() -> GoTemplate:
    raise Untranslatable("the run has no chat template")


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
