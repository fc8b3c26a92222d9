"""Token ids and positions of the data held against the rows of the base's matrices, before anything is trained.

A tokenizer may have tokens for which its model's embedding has no row (ChatML added to a base without a resize), and
learned positions have an end. An index beyond a matrix stops a step, on a GPU without a word about the reason.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from qlora.data.prepare import Prepared
from qlora.errors import DataError

POSITION_NAMES = ("wpe", "positions", "position_embeddings", "positions_embed", "pos_encoding")
POSITION_TABLES = ("embed_positions", "pos_encoding")  # buffers [positions, width]


def refuse_ids_without_row(prepared: Prepared, tokenizer: Any, rows: int) -> None:
    """DataError, naming token, id and place, for a token id that has no row in an embedding of `rows` rows."""
    examples = getattr(prepared.train, "examples", None)
    first = examples.first_with_id_from(rows) if examples is not None else None
    if examples is None or first is None:
        return
    index, token_id = first
    text = tokenizer.convert_ids_to_tokens(token_id)
    remedy = (
        f"adapter.new_tokens=[{text!r}] adds a row and trains it" if text in tokenizer.get_vocab() else "fix the ids"
    )
    raise DataError(
        f"{examples.where(index)}: token {text!r} (id {token_id:,}) has no row in the model's embedding, which has "
        f"{rows:,} rows. Use the model's own tokenizer and chat template; or {remedy}."
    )


def refuse_long_documents(prepared: Prepared, limit: int | None) -> None:
    """DataError for an example that is longer than the `limit` positions that the model has learned."""
    longest = longest_document(prepared)
    if limit is not None and longest > limit:
        raise DataError(
            f"data.max_length: an example has {longest:,} tokens, but the model has learned {limit:,} positions. "
            f"Set data.max_length={limit}."
        )


def rows_with_new_tokens(rows: int, tokenizer: Any, new_tokens: Sequence[str]) -> int:
    """Rows of the embedding once `new_tokens`, which `tokenizer` has already, have theirs."""
    return max([rows, *(int(token) + 1 for token in tokenizer.convert_tokens_to_ids(list(new_tokens)))])


def longest_document(prepared: Prepared) -> int:
    """Tokens of the longest example."""
    examples = getattr(prepared.train, "examples", None)
    return int(examples.lengths.max()) if examples is not None and len(examples) else 0


def position_limit(model: nn.Module) -> int | None:
    """The number of positions in the model's tables of learned or computed positions; None without such a table."""
    sizes: list[int] = []
    tokens = model.get_input_embeddings()  # type: ignore[operator]
    for path, module in model.named_modules():
        if (
            isinstance(module, nn.Embedding)
            and module is not tokens
            and path.rpartition(".")[2].endswith(POSITION_NAMES)
        ):
            sizes.append(module.num_embeddings - int(getattr(module, "offset", 0)))
        sizes += [len(value) for name, value in module.named_buffers(recurse=False) if name in POSITION_TABLES]
    return min(sizes, default=None)
