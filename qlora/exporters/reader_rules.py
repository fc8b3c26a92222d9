"""What each reader of an exported model does with its configuration files: rules by reader and version, and a lint.

A reader that does not know a key takes a default of its own, and computes another model without a word. Each rule says
what one release does, and how that is known: run here with that release, or its source.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.model.config_dialects import FULL, ROPE, TEXT, window_pattern
from qlora.model.download import TEMPLATE_FILE
from qlora.model.tokenizer_files import ADDED, CONFIG, DECODER, PIECES, read_object, unlisted_tokens

RUN = "run"  # the release was run on exported folders, answers compared token for token


@dataclass(frozen=True)
class ExportedFiles:
    """The files that readers look at, read once."""

    folder: Path
    config: Mapping[str, Any]
    text: Mapping[str, Any]  # the section of the text model
    tokenizer: Mapping[str, Any]
    generation: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        """The kind of the text model."""
        return str(self.text.get("model_type", ""))

    @property
    def window(self) -> int:
        """The sliding window in tokens; 0: none, or not shorter than the context."""
        window, context = self.text.get("sliding_window"), self.text.get("max_position_embeddings") or 0
        in_use = self.text.get("use_sliding_window", True)
        return int(window) if isinstance(window, int) and in_use and window < context else 0


@dataclass(frozen=True)
class ReaderFinding:
    """What a reader makes of a folder, other than what was trained."""

    reader: str
    version: str
    file: str
    message: str
    source: str

    def __str__(self) -> str:
        return f"{self.reader} {self.version}, {self.file}: {self.message}"


@dataclass(frozen=True)
class Rule:
    """One reader and one thing it does; `applies`: whether it matters for these files."""

    reader: str
    version: str
    file: str
    message: str
    source: str
    applies: Callable[[ExportedFiles], bool]


def findings(folder: Path) -> list[ReaderFinding]:
    """The rules that apply to a folder with config.json; empty where every reader computes what was trained."""
    files = _read(folder)
    return [
        ReaderFinding(rule.reader, rule.version, rule.file, rule.message, rule.source)
        for rule in RULES
        if rule.applies(files)
    ]


def _read(folder: Path) -> ExportedFiles:
    names = ("config.json", CONFIG, "generation_config.json")
    config, tokenizer, generation = (read_object(folder / n) if (folder / n).is_file() else {} for n in names)
    text = config.get(TEXT)
    return ExportedFiles(folder, config, text if isinstance(text, dict) else config, tokenizer, generation)


def _lacks_old_rope(files: ExportedFiles) -> bool:
    return isinstance(files.text.get(ROPE), dict) and "rope_theta" not in files.text


def _lacks_neox_rope(files: ExportedFiles) -> bool:
    return files.model_type == "gpt_neox" and not files.text.keys() >= {"rotary_pct", "rotary_emb_base"}


def _has_new_class(files: ExportedFiles) -> bool:
    new_class = files.tokenizer.get("tokenizer_class") == "TokenizersBackend"
    return new_class or isinstance(files.tokenizer.get("extra_special_tokens"), list)


def _has_no_template(files: ExportedFiles) -> bool:
    return "chat_template" not in files.tokenizer and not (files.folder / TEMPLATE_FILE).is_file()


def _has_unlisted_tokens(files: ExportedFiles) -> bool:
    if not (files.folder / PIECES).is_file() or (files.folder / ADDED).is_file():
        return False
    listed = files.tokenizer.get(DECODER) or {}
    return not {*map(str, unlisted_tokens(files.folder).values())} <= {*listed}


def _has_other_layer_pattern(files: ExportedFiles) -> bool:
    layers = files.text.get("layer_types") or ()
    full_only_late = FULL not in layers and len(layers) < 6
    return files.model_type.startswith("gemma3") and bool(layers) and window_pattern(layers) != 6 and not full_only_late


def _has_dtype_in_new_key_only(files: ExportedFiles) -> bool:
    return "dtype" in files.config and "torch_dtype" not in files.config


def _has_window(*model_types: str) -> Callable[[ExportedFiles], bool]:
    return lambda files: files.model_type in model_types and files.window > 0


_ROPE = "does not know rope_parameters: without rope_theta and rope_scaling it computes another model"
_NO_WINDOW = "has no sliding window for this architecture: longer contexts are computed otherwise"
RULES = (
    Rule("transformers", "4.57.3", "config.json", _ROPE, RUN, _lacks_old_rope),
    Rule("Ollama", "fb30760", "config.json", _ROPE, RUN, _lacks_old_rope),
    Rule("mlx-lm", "0.32.2", "config.json", _ROPE, RUN, _lacks_old_rope),
    Rule("llama.cpp", "b11669", "config.json", "needs rotary_pct", "KeyError when run", _lacks_neox_rope),
    Rule("mlx-lm", "0.32.2", "config.json", "needs rotary_emb_base and rotary_pct", RUN, _lacks_neox_rope),
    Rule(
        "transformers", "4.55.4", "config.json", "reads torch_dtype, and else loads in float32",
        "configuration_utils.py of its wheel: torch_dtype alone is read", _has_dtype_in_new_key_only,
    ),
    Rule("transformers", "4.57.3", CONFIG, "does not know this tokenizer_class or form", RUN, _has_new_class),
    Rule(
        "vLLM", "0.32.0", TEMPLATE_FILE, "refuses chats without a template (400)", RUN, _has_no_template,
    ),
    Rule(
        "SGLang", "docs", TEMPLATE_FILE, "takes the tokenizer's; without one: --chat-template",
        "its documentation, page Custom Chat Template, 2026-11", _has_no_template,
    ),
    Rule(
        "Ollama", "fb30760", CONFIG, "its converter reads the key chat_template only", RUN,
        lambda files: "chat_template" not in files.tokenizer,
    ),
    Rule(
        "llama.cpp", "b11669", ADDED, "added tokens that are in tokenizer.json only become unused ones", RUN,
        _has_unlisted_tokens,
    ),
    Rule("llama.cpp", "b11669", "config.json", _NO_WINDOW, RUN, _has_window("mistral")),
    Rule("mlx-lm", "0.32.2", "config.json", _NO_WINDOW, RUN, _has_window("mistral", "gemma2")),
    Rule(
        "llama.cpp", "b11669", "config.json", "every sixth layer has full attention, whatever layer_types say", RUN,
        _has_other_layer_pattern,
    ),
)  # fmt: skip
