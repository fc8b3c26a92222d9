"""What an export holds beside its weights for a conversation: tokenizer, chat template, tokens that end an answer.

Everything is written in each place where some reader looks for it. `chat_template.jinja` is transformers' form since
4.51; Ollama's and llama.cpp's converters and older readers know the key in tokenizer_config.json only.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.model.download import NAMED_TEMPLATES, TEMPLATE_FILE
from qlora.model.meta_model import read_config
from qlora.model.tokenizer_files import (
    ADDED,
    CONFIG,
    DECODER,
    PIECES,
    read_object,
    unlisted_tokens,
    write_object,
    write_tokenizer,
)
from qlora.utils.atomic_files import write_bytes

TEMPLATE_KEY, DEFAULT = "chat_template", "default"
GENERATION = "generation_config.json"
LEAKED = ("is_local", "local_files_only")  # arguments of transformers' reader, which its writer saves
NEW_CLASS, KNOWN_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"  # one class; transformers 4 knows the second
EXTRA, KNOWN_EXTRA = "extra_special_tokens", "additional_special_tokens"


@dataclass(frozen=True)
class ServedFiles:
    """The tokenizer of a run, its chat templates as a server needs them, and its stop tokens."""

    tokenizer_folder: Path  # with the tokenizer's files
    base_folder: Path
    extended: Any | None = None  # the tokenizer, if it has more tokens than its files
    templates: Mapping[str, str] | None = None  # by transformers' names, `default` among them
    stop_token_ids: Sequence[int] = ()

    @property
    def chat_template(self) -> str:
        """The template that is written, in Jinja; empty if there is none."""
        return (self.templates or {}).get(DEFAULT, "")

    def write(self, folder: Path) -> None:
        """Write all files. BaseModelError if a file of the base is no JSON object."""
        write_tokenizer(folder, self.tokenizer_folder, self.extended)
        if self.templates:
            self._write_templates(folder, self.templates)
        if (folder / CONFIG).is_file():
            config = read_object(folder / CONFIG)
            readable = _with_template(readable_config(config), self.templates or {})
            if readable != config:
                write_object(folder / CONFIG, readable)
        _list_added_tokens(folder)
        content = generation_config(self.base_folder, self.stop_token_ids)
        if content is not None:
            write_bytes(folder / GENERATION, content)

    def _write_templates(self, folder: Path, templates: Mapping[str, str]) -> None:
        """The default template and the named ones; those of the base that training did not use are removed."""
        write_bytes(folder / TEMPLATE_FILE, templates[DEFAULT].encode())
        named = folder / Path(NAMED_TEMPLATES).parent
        for file in named.glob("*.jinja"):
            file.unlink()
        others = {name: text for name, text in templates.items() if name != DEFAULT}
        for name, text in others.items():
            named.mkdir(exist_ok=True)
            write_bytes(named / f"{name}.jinja", text.encode())
        if named.is_dir() and not others:
            named.rmdir()


def readable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json of transformers 5 in words that transformers 4.5 reads too; others are unchanged."""
    readable = {key: value for key, value in config.items() if key not in LEAKED}
    if readable.get("tokenizer_class") == NEW_CLASS:
        readable["tokenizer_class"] = KNOWN_CLASS
    if isinstance(readable.get(EXTRA), list):
        extra = readable.pop(EXTRA)
        readable.setdefault(KNOWN_EXTRA, extra)
    return readable


def generation_config(base_folder: Path, stop_token_ids: Sequence[int]) -> bytes | None:
    """The base's generation_config.json, or one with all tokens that end an answer if it lacks some; None: no need."""
    path = base_folder / GENERATION
    generation = read_object(path) if path.is_file() else {}
    text = read_config(base_folder).get_text_config()
    stops = generation.get("eos_token_id") if generation else text.eos_token_id
    if stop_token_ids and not {*stop_token_ids} <= {*(stops if isinstance(stops, list) else [stops])}:
        kept = {key: value for key, value in generation.items() if key != "_from_model_config"}
        changed = kept | {"eos_token_id": list(stop_token_ids)}
        return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()
    return path.read_bytes() if generation else None


def _with_template(config: Mapping[str, Any], templates: Mapping[str, str]) -> dict[str, Any]:
    """The config with the templates: a list of named ones, or the only one."""
    if not templates:
        return dict(config)
    if len(templates) == 1:
        return {**config, TEMPLATE_KEY: templates[DEFAULT]}
    return {**config, TEMPLATE_KEY: [{"name": name, "template": text} for name, text in templates.items()]}


def _list_added_tokens(folder: Path) -> None:
    """added_tokens.json beside tokenizer.model: converters don't read the added tokens of tokenizer.json."""
    if not (folder / PIECES).is_file() or (folder / ADDED).is_file():
        return
    decoder = read_object(folder / CONFIG).get(DECODER) if (folder / CONFIG).is_file() else None
    tokens = unlisted_tokens(folder)
    if tokens and not {*map(str, tokens.values())} <= {*(decoder or ())}:
        write_object(folder / ADDED, tokens)
