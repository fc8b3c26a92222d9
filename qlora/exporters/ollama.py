"""Export target `ollama`: a merged model, and a Modelfile with the chat template of training and its stop tokens."""

from pathlib import Path

from qlora.exporters.export_source import ExportOptions, ExportSource
from qlora.exporters.go_template import GoTemplate, Untranslatable, translate
from qlora.exporters.merged import MergedExporter
from qlora.utils.atomic_files import write_text

MODELFILE = "Modelfile"


class OllamaExporter:
    """Writes a merged model and its Modelfile."""

    def write(self, source: ExportSource, folder: Path, options: ExportOptions) -> int:
        """Write the merged model and its Modelfile; returns the bytes of the tensors."""
        size = MergedExporter().write(source, folder, options)
        write_text(folder / MODELFILE, build_modelfile(source))
        return size


def build_modelfile(source: ExportSource) -> str:
    """The Modelfile: FROM this folder, TEMPLATE if it can be translated, a stop for each end token."""
    lines = ["FROM ."]
    try:
        template = _translate(source)
        lines.append(f'TEMPLATE """{template.text}"""')
        if template.system:
            lines.append(f'SYSTEM """{template.system}"""')
    except Untranslatable as error:
        lines.append(f"# No TEMPLATE: {error}. Ollama uses the one it finds in the model.")
    lines += [f'PARAMETER stop "{_escape(token)}"' for token in source.stop_tokens]
    return "\n".join([*lines, ""])


def _translate(source: ExportSource) -> GoTemplate:
    if source.template is None:
        raise Untranslatable("the run has no chat template")
    return translate(source.template)


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
