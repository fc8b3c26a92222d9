"""New tokens of a base model: added to its tokenizer, with rows in embedding and head.

Spare rows are used first, as many models have them. Then the matrices grow by rows that are the mean of the others.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AddedToken

from qlora.errors import BaseModelError


def add_tokens(tokenizer: Any, texts: Sequence[str], rows: int) -> list[int]:
    """Add `texts` as tokens to a tokenizer; returns their ids. BaseModelError if one exists or is listed twice.

    A token that the tokenizer has, but not the model's `rows` rows, needs a row only.
    """
    vocabulary = tokenizer.get_vocab()
    for number, text in enumerate(texts):
        if text in texts[:number]:
            raise BaseModelError(f"adapter.new_tokens: {text!r} is listed twice. Remove it.")
        if vocabulary.get(text, rows) < rows:
            raise BaseModelError(
                f"adapter.new_tokens: {text!r} is a token of this base already: adapter.tokens trains its row. "
                "Remove it."
            )
    new = [text for text in texts if text not in vocabulary]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in new])
    return [int(token) for token in tokenizer.convert_tokens_to_ids(list(texts))]


def add_tokens_and_resize(model: Any, tokenizer: Any, texts: Sequence[str]) -> None:
    """Add `texts` to the tokenizer, and rows to embedding and head unless there are spare ones."""
    used, spare = len(tokenizer), len(model.get_input_embeddings().weight)
    rows = max(add_tokens(tokenizer, texts, spare)) + 1
    if rows > spare:
        resize_vocabulary(model, rows, used)


def resize_vocabulary(model: Any, rows: int, used: int) -> None:
    """Cut embedding and head to `rows`, or add rows that are the mean of the first `used`; tied ones stay tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    embedding.weight = _with_rows(embedding.weight, rows, used)
    embedding.num_embeddings = rows
    if head is not None:
        head.weight = embedding.weight if tied else _with_rows(head.weight, rows, used)
        head.out_features = rows
        if getattr(head, "bias", None) is not None:
            head.bias = nn.Parameter(F.pad(head.bias, (0, rows - len(head.bias))), requires_grad=False)
    model.config.get_text_config().vocab_size = rows


@torch.no_grad()
def _with_rows(weight: Tensor, rows: int, used: int) -> nn.Parameter:
    """The first `rows` of W [V, I]; added ones are the mean of the first `used`, those of the tokenizer's tokens."""
    if rows <= len(weight):
        return nn.Parameter(weight[:rows].clone(), requires_grad=False)
    mean = weight[:used].mean(0, dtype=torch.float32).to(weight.dtype)
    return nn.Parameter(torch.cat([weight, mean.expand(rows - len(weight), -1)]), requires_grad=False)
