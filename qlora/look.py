"""A recipe looked at before any weight is loaded: checked, planned, previewed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora.adapters.inject import select
from qlora.base.folder import find
from qlora.base.skeleton import build, linear_paths, read_config, read_tokenizer
from qlora.data.prepare import prepare
from qlora.data.preview import preview
from qlora.data.tokens import Encoder
from qlora.errors import QloraError
from qlora.recipe import Recipe, read


def preview_rows(recipe: Recipe, count: int) -> list[dict[str, Any]]:
    """The first `count` rows as they will be trained: where, input_ids, labels, segments."""
    return preview(recipe.data, encoder_of(recipe), count, recipe.train.seed)


def encoder_of(recipe: Recipe) -> Encoder:
    """Text to tokens as in training, without the model."""
    tokenizer = read_tokenizer(find(recipe.model.name, recipe.model.revision).path)
    return Encoder(tokenizer, recipe.data.train_on, recipe.model.chat_template)
