"""An adapter of another tool on its base: fitted to the base, and read with the tokenizer that it was saved with."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qlora.adapters.fit_to_base import fit_to_base
from qlora.adapters.peft_files import AdapterFile
from qlora.errors import BaseModelError
from qlora.model.load_base import Base
from qlora.model.meta_model import read_tokenizer
from qlora.model.original_weights import iter_weights
from qlora.runs.artifacts import RECIPE

Log = Callable[[str], None]
NEEDED = ("tokenizer.json", "tokenizer_config.json")  # one of them makes a tokenizer


def fit_to(base: Base, file: AdapterFile, log: Log) -> AdapterFile:
    """The adapter for a base, whose vocabulary may change with it. AdapterError if it can't be read."""
    return fit_to_base(file, base.model, partial(iter_weights, base.folder.path), log)


def with_own_tokenizer(base: Base, folder: Path, log: Log) -> Base | None:
    """The base with the tokenizer in a folder of another tool; None if there is none, or it is the base's own.

    Its chat template and its tokens are those of training.
    """
    if (folder / RECIPE).is_file() or not any((folder / name).is_file() for name in NEEDED):
        return None
    try:
        tokenizer = read_tokenizer(folder)
    except BaseModelError as error:
        log(f"careful: the tokenizer in {folder} is left out, the base's is used: {error}")
        return None
    differences = _differences(base.tokenizer, tokenizer)
    if not differences:
        return None
    log(f"{folder}: its tokenizer is used: other {' and '.join(differences)} than the base's")
    rows = len(base.model.get_input_embeddings().weight)  # type: ignore[operator]
    beyond = sorted(text for text, number in tokenizer.get_vocab().items() if number >= rows)
    if beyond:
        log(f"careful: {', '.join(beyond[:3])} of that tokenizer have no row in this base, and can't be used")
    eos = tokenizer.eos_token_id
    stops = {*base.stop_token_ids, *([eos] if isinstance(eos, int) else [])}
    return replace(base, tokenizer=tokenizer, stop_token_ids=tuple(sorted(stops)))


def _differences(first: Any, second: Any) -> list[str]:
    """What two tokenizers differ in: tokens, chat template, end token."""
    pairs = {
        "tokens": (_tokens(first), _tokens(second)),
        "chat template": (first.chat_template, second.chat_template),
        "end token": (first.eos_token, second.eos_token),
    }
    return [name for name, (one, other) in pairs.items() if one != other]


def _tokens(tokenizer: Any) -> Any:
    """All that token ids depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    return {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")}
