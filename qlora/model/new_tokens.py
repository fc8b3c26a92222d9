"""A base with tokens more than its files have, in its tokenizer and as rows of its matrices.  Door: transformers.

Spare rows are used first, as many models have them; then the matrices grow, by rows that are the mean of the others.
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
    """Put new tokens into a tokenizer; returns their ids. BaseModelError for one that it has, or that is said twice."""
    known = tokenizer.get_vocab()
    for number, text in enumerate(texts):
        if text in known or text in texts[:number]:
            why = (
                "is a token of this base already: adapter.tokens trains its row" if text in known else "is there twice"
            )
            raise BaseModelError(f"adapter.new_tokens: {text!r} {why}. Remove it.")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])
    return [int(number) for number in tokenizer.convert_tokens_to_ids(list(texts))]


def grow(model: Any, tokenizer: Any, texts: Sequence[str]) -> None:
    """Add `texts` to the tokenizer, and rows to embedding and head where they have none for them."""
    real = len(tokenizer)
    rows = max(add_tokens(tokenizer, texts)) + 1
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if rows <= len(embedding.weight):
        return
    tied = head is not None and head.weight is embedding.weight
    embedding.weight = _longer(embedding.weight, rows, real)
    embedding.num_embeddings = rows
    if head is not None:
        head.weight = embedding.weight if tied else _longer(head.weight, rows, real)
        head.out_features = rows
    model.config.get_text_config().vocab_size = rows


def save_tokenizer(tokenizer: Any, folder: Path) -> list[str]:
    """Write a tokenizer that has grown as transformers does; returns the names of its files."""
    with tempfile.TemporaryDirectory() as aside:
        tokenizer.save_pretrained(aside)
        files = tokenizer_files(Path(aside))
        for file in files:
            write_bytes(folder / file.name, file.read_bytes())
    return [file.name for file in files]


@torch.no_grad()
def _longer(weight: Tensor, rows: int, real: int) -> nn.Parameter:
    """W [V, I] with rows added up to `rows`, each the mean of the first `real`, those of the tokenizer's own tokens."""
    mean = weight[:real].mean(0, dtype=torch.float32).to(weight.dtype)
    return nn.Parameter(torch.cat([weight, mean.expand(rows - len(weight), -1)]), requires_grad=False)
