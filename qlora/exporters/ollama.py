"""Export target `ollama`: a GGUF file and a Modelfile with the chat template of training and its stop tokens.

Where no GGUF can be written, the folder is the merged one, which Ollama's importer reads for a few architectures only.
"""

from dataclasses import replace
from pathlib import Path

from qlora.errors import InputError
from qlora.exporters.export_source import ExportOptions, ExportSource
from qlora.exporters.gguf import MODEL_FILE
from qlora.exporters.gguf.gguf import GgufExporter
from qlora.exporters.gguf.gguf_file import GgufFile, require_gguf
from qlora.exporters.go_template import GoTemplate, translate
from qlora.exporters.merged import MergedExporter
from qlora.exporters.message_affixes import Untranslatable
from qlora.model.dtypes import dtype_name
from qlora.utils.atomic_files import read_json, write_text

MODELFILE = "Modelfile"


class OllamaExporter:
    """Writes a model and its Modelfile."""

    def write(self, source: ExportSource, folder: Path, options: ExportOptions) -> int:
        """Write the model, as a GGUF file if there is one for it, and its Modelfile; returns the bytes of the tensors.

        Why there is no GGUF file is a line of `options.lines` and of the Modelfile.
        """
        try:
            require_gguf()
            size = GgufExporter().write(source, folder, replace(options, storage=dtype_name(options.dtype)))
        except InputError as error:
            reason = str(error).partition("\n")[0]
            options.lines.append(f"careful: a merged folder, which Ollama imports for few architectures: {reason}")
            size = MergedExporter().write(source, folder, options)
            modelfile = f"# No GGUF file: {reason}\n{build_modelfile(source, '.', converter_adds_bos(folder))}"
        else:
            adds_bos = bool(GgufFile(folder / MODEL_FILE).get("tokenizer.ggml.add_bos_token", False))
            modelfile = build_modelfile(source, f"./{MODEL_FILE}", adds_bos)
        write_text(folder / MODELFILE, modelfile)
        return size


def converter_adds_bos(folder: Path) -> bool:
    """Whether Ollama puts the beginning-of-text token before a prompt of the model that it converts from `folder`.

    Ollama's `convert/tokenizer.go` (commit fb30760, 2026-08-21): with tokenizer.model, or where the key says so.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    return bool(config.get("add_bos_token", (folder / "tokenizer.model").is_file()))


def build_modelfile(source: ExportSource, model: str, adds_bos: bool) -> str:
    """The Modelfile: FROM the model, TEMPLATE if it can be translated, a stop for each end token.

    adds_bos: whether Ollama puts the beginning-of-text token before a prompt; else the TEMPLATE does, if training did.
    """
    lines = [f"FROM {model}"]
    try:
        template = _translate(source)
        lines += _template_lines(template, "" if adds_bos else _own_bos(source))
    except Untranslatable as error:
        lines.append(f"# No TEMPLATE: {error}. Ollama uses the one it finds in the model, if any.")
    lines += [f'PARAMETER stop "{_quoted(token)}"' for token in source.stop_tokens]
    return "\n".join([*lines, ""])


def _template_lines(template: GoTemplate, bos: str) -> list[str]:
    lines = []
    if template.trimmed:
        roles = " and ".join(template.trimmed)
        lines = [
            f"# In training the chat template stripped blanks and line ends around messages of the {roles}.",
            "# Ollama's template language can't: send such messages without them.",
        ]
    lines.append(f'TEMPLATE """{bos}{template.text}"""')
    return [*lines, *([f'SYSTEM """{template.system}"""'] if template.system else [])]


def _translate(source: ExportSource) -> GoTemplate:
    if source.template is None:
        raise Untranslatable("the run has no chat template")
    return translate(source.template)


def _own_bos(source: ExportSource) -> str:
    """The beginning-of-text token, if the template of training writes it itself; else empty."""
    template = source.template
    if template is None or not template.bos:
        return ""
    prompt = template.render([{"role": "user", "content": "?"}], prompt=True)
    return template.bos if prompt.startswith(template.bos) else ""


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
