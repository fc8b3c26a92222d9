"""A tokenizer's files beside a trained model: those of the base byte for byte, with new tokens patched in.

transformers would write them anew in its latest form, which older readers and converters can't read: it drops
tokenizer.model, renames the class and adds fields of its own.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora.errors import BaseModelError
from qlora.model.download import NAMED_TEMPLATES, tokenizer_files
from qlora.model.meta_model import read_tokenizer
from qlora.utils.atomic_files import write_bytes

VOCABULARY, CONFIG, ADDED, PIECES = "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "tokenizer.model"
SPECIAL, DECODER = "special_tokens_map.json", "added_tokens_decoder"
FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")

Tokens = Mapping[int, Any]  # id -> AddedToken


def write_tokenizer(folder: Path, base_folder: Path, extended: Any | None) -> list[str]:
    """Copy a base's tokenizer files; `extended`: its tokenizer with new tokens, which are patched into the copies.

    Returns the names of the files. BaseModelError if a file that must be patched is no JSON object.
    """
    files = tokenizer_files(base_folder)
    for file in files:
        write_bytes(folder / file.name, file.read_bytes())
    for file in base_folder.glob(NAMED_TEMPLATES):
        (folder / file.parent.name).mkdir(exist_ok=True)
        write_bytes(folder / file.parent.name / file.name, file.read_bytes())
    names = [file.name for file in files]
    if extended is None:
        return names
    return sorted({*names, *add_to_files(folder, new_tokens(extended, base_folder), extended)})


def new_tokens(extended: Any, base_folder: Path) -> Tokens:
    """The tokens that a tokenizer has, and the files of its base do not."""
    known = read_tokenizer(base_folder).get_vocab()
    added = sorted(extended.added_tokens_decoder.items())
    return {number: token for number, token in added if token.content not in known}


def add_to_files(folder: Path, tokens: Tokens, extended: Any) -> list[str]:
    """Add tokens to a tokenizer's files, in every file where some reader looks for them; returns the files' names."""
    if not tokens:
        return []
    changed, has_vocabulary = list[str](), (folder / VOCABULARY).is_file()
    if has_vocabulary:
        content = read_object(folder / VOCABULARY)
        entries = [{"id": number} | flags_of(token) for number, token in tokens.items()]
        write_object(folder / VOCABULARY, content | {"added_tokens": [*(content.get("added_tokens") or ()), *entries]})
        changed.append(VOCABULARY)
    if not has_vocabulary or (folder / PIECES).is_file() or (folder / ADDED).is_file():
        listed = read_object(folder / ADDED) if (folder / ADDED).is_file() else unlisted_tokens(folder)
        write_object(folder / ADDED, listed | {token.content: number for number, token in tokens.items()})
        changed.append(ADDED)
    if (folder / CONFIG).is_file():
        config = read_object(folder / CONFIG)
        if DECODER in config:
            config[DECODER] |= {str(number): flags_of(token) for number, token in tokens.items()}
            write_object(folder / CONFIG, config)
        elif not has_vocabulary:
            write_object(folder / CONFIG, config | _decoder_of(extended, folder, config))
    return changed


def _decoder_of(extended: Any, folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """All added tokens, for a config that lists none; its reader takes the special tokens from there then."""
    path = folder / SPECIAL
    named = read_object(path) if path.is_file() else {}
    texts = {key: value["content"] if isinstance(value, dict) else value for key, value in named.items()}
    decoder = {str(number): flags_of(token) for number, token in sorted(extended.added_tokens_decoder.items())}
    return {key: value for key, value in texts.items() if key not in config} | {DECODER: decoder}


def unlisted_tokens(folder: Path) -> dict[str, int]:
    """Added tokens of tokenizer.json that are no pieces of its vocabulary: text -> id. Empty without the file."""
    path = folder / VOCABULARY
    if not path.is_file():
        return {}
    content = read_object(path)
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    pieces = vocabulary.keys() if isinstance(vocabulary, dict) else {piece[0] for piece in vocabulary}
    added = content.get("added_tokens") or ()
    return {token["content"]: int(token["id"]) for token in added if token["content"] not in pieces}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a tokenizer's file, of any size. BaseModelError for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(f"model: {path} is no JSON: {error}. Fetch the file again.") from None
    if not isinstance(value, dict):
        raise BaseModelError(f"model: {path}: found {type(value).__name__}, allowed: a JSON object. Fetch it again.")
    return value


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    """Write a tokenizer's file as transformers does: nothing is redacted, a vocabulary may hold any text."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode("utf-8", "surrogatepass"))


def flags_of(token: Any) -> dict[str, Any]:
    """An added token as in `added_tokens_decoder`."""
    return {"content": token.content} | {flag: bool(getattr(token, flag)) for flag in FLAGS}
