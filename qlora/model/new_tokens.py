"""New tokens of a base model: added to its tokenizer, with rows in embedding and head.

Spare rows are used first, as many models have them. Then the matrices grow by rows that are the mean of the others.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AddedToken

from qlora.errors import BaseModelError
from qlora.model.download import tokenizer_files
from qlora.utils.atomic_files import write_bytes


def add_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Add `texts` as tokens to a tokenizer; returns their ids. BaseModelError if one exists or is listed twice."""
    vocabulary = tokenizer.get_vocab()
    for number, text in enumerate(texts):
        if text in vocabulary or text in texts[:number]:
            reason = (
                "is a token of this base already: adapter.tokens trains its row"
                if text in vocabulary
                else "is listed twice"
            )
            raise BaseModelError(f"adapter.new_tokens: {text!r} {reason}. Remove it.")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])
    return [int(token) for token in tokenizer.convert_tokens_to_ids(list(texts))]


def add_tokens_and_resize(model: Any, tokenizer: Any, texts: Sequence[str]) -> None:
    """Add `texts` to the tokenizer, and rows to embedding and head unless there are spare ones."""
    used = len(tokenizer)
    rows = max(add_tokens(tokenizer, texts)) + 1
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if rows <= len(embedding.weight):
        return
    tied = head is not None and head.weight is embedding.weight
    embedding.weight = _with_rows(embedding.weight, rows, used)
    embedding.num_embeddings = rows
    if head is not None:
        head.weight = embedding.weight if tied else _with_rows(head.weight, rows, used)
        head.out_features = rows
    model.config.get_text_config().vocab_size = rows


def save_tokenizer(tokenizer: Any, folder: Path) -> list[str]:
    """Write a tokenizer with new tokens as transformers does; returns the names of its files."""
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        files = tokenizer_files(Path(temporary))
        for file in files:
            write_bytes(folder / file.name, file.read_bytes())
    return [file.name for file in files]


def write_tokenizer(folder: Path, base_folder: Path, extended: Any | None) -> list[str]:
    """Copy a base's tokenizer files, or save `extended`, its tokenizer with new tokens; returns the file names."""
    if extended is not None:
        return save_tokenizer(extended, folder)
    files = tokenizer_files(base_folder)
    for file in files:
        write_bytes(folder / file.name, file.read_bytes())
    return [file.name for file in files]


@torch.no_grad()
def _with_rows(weight: Tensor, rows: int, used: int) -> nn.Parameter:
    """W [V, I] with rows added up to `rows`, each the mean of the first `used`, those of the tokenizer's own tokens."""
    mean = weight[:used].mean(0, dtype=torch.float32).to(weight.dtype)
    return nn.Parameter(torch.cat([weight, mean.expand(rows - len(weight), -1)]), requires_grad=False)
