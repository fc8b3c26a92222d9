"""A data set looked at before there is a recipe: its format, its rows, how long they are. A sample is enough."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora.data.conversations.encode_records import format_of
from qlora.data.conversations.encoder import Encoder
from qlora.data.data_report import DataReport
from qlora.data.prepare import prepare
from qlora.data.reading import source
from qlora.data.reading.resolve_paths import locate
from qlora.data.types import Record
from qlora.errors import DataError
from qlora.model.download import find_config, find_tokenizer
from qlora.model.meta_model import read_tokenizer
from qlora.model.new_tokens import add_tokens
from qlora.recipe.recipe import Recipe, from_mapping
from qlora.utils.atomic_files import read_json

SAMPLE_ROWS = 2_000  # tokenised for a look; a quantile of them is off by a per cent or two
NO_LIMIT = 2**20  # tokens: rows are measured, not cut


@dataclass(frozen=True)
class DatasetProfile:
    """What a look at a data set showed; tokens are those of the model's own tokenizer and template."""

    format: str
    rows: int | None  # in all; None for a data set of the hub that was not read to its end
    looked_at: int
    lengths: np.ndarray[Any, Any]  # tokens of each row looked at, rising
    trained_share: float  # of the tokens
    report: DataReport
    context: int  # tokens that the model can see at once

    def length_of(self, share: float) -> int:
        """The tokens that `share` of the rows do not exceed."""
        return int(self.lengths[min(len(self.lengths) - 1, math.ceil(share * len(self.lengths)) - 1)])

    @property
    def tokens(self) -> int:
        """Tokens of all rows, reckoned from those looked at."""
        return round(float(self.lengths.mean()) * (self.rows or self.looked_at))


def profile_dataset(model: str, data: str) -> DatasetProfile:
    """Read a sample of the rows as training would. BaseModelError without a tokenizer, DataError without a row."""
    section = {"train": [{"path": data, "max_samples": SAMPLE_ROWS}], "eval_fraction": 0.0}
    recipe, _ = from_mapping({"model": model, "data": section | {"packing": False, "max_length": NO_LIMIT}})
    prepared = prepare(recipe.data, encoder_of(recipe), recipe.train.seed)
    report = prepared.report
    if not report.kept:
        reason = next((f"{found.where}: {found.message}" for found in (*report.problems, *report.warnings)), data)
        raise DataError(f"{reason}. None of the {report.rows:,} rows looked at can be trained on.")
    lengths = np.sort(np.asarray([len(each) for each in prepared.train]))
    rows = report.rows if report.rows < SAMPLE_ROWS else _count(recipe)
    share = report.trained_tokens / max(1, report.tokens)
    return DatasetProfile(_format(recipe), rows, report.rows, lengths, share, report, context_of(model))


def encoder_of(recipe: Recipe) -> Encoder:
    """Text to tokens as in training, from the tokenizer's files alone: no weight is downloaded."""
    tokenizer = read_tokenizer(find_tokenizer(recipe.model.name, recipe.model.revision))
    add_tokens(tokenizer, recipe.adapter.new_tokens)
    return Encoder(tokenizer, recipe.data.train_on, recipe.model.chat_template)


def context_of(model: str, revision: str | None = None) -> int:
    """The tokens that a model can see at once, as its config.json says."""
    config = read_json(find_config(model, revision))
    text = config.get("text_config")
    found = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else NO_LIMIT


def _count(recipe: Recipe) -> int | None:
    """All rows of local files; those of the hub are not fetched for it."""
    (train,) = recipe.data.train
    whole = train.model_copy(update={"max_samples": None})
    located = locate(whole)
    return None if located.hub else sum(1 for _ in source.read(whole, located, (0, 0)))


def _format(recipe: Recipe) -> str:
    first = next((row for row in source.rows(recipe.data.train, 0) if isinstance(row, Record)), None)
    return (format_of(first) if first else None) or "auto"
