"""A recipe looked at before any weight is loaded: checked, planned, previewed."""

from typing import Any

from qlora.base.folder import find
from qlora.base.skeleton import read_tokenizer
from qlora.data.preview import preview
from qlora.data.tokens import Encoder
from qlora.recipe import Recipe


def preview_rows(recipe: Recipe, count: int) -> list[dict[str, Any]]:
    """The first `count` rows as they will be trained: where, input_ids, labels, segments."""
    return preview(recipe.data, encoder_of(recipe), count, recipe.train.seed)


def encoder_of(recipe: Recipe) -> Encoder:
    """Text to tokens as in training, without the model."""
    tokenizer = read_tokenizer(find(recipe.model.name, recipe.model.revision).path)
    return Encoder(tokenizer, recipe.data.train_on, recipe.model.chat_template)
