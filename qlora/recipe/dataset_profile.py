"""The profile of a data set, before there is a recipe: format, number of records, lengths, from a sample."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora.data.conversations.chat_template import TemplateOptions
from qlora.data.conversations.encode_records import detect_format
from qlora.data.conversations.encoder import Encoder
from qlora.data.data_report import DataReport
from qlora.data.prepare import prepare
from qlora.data.reading import source
from qlora.data.reading.resolve_paths import resolve_source
from qlora.data.types import Record
from qlora.errors import DataError
from qlora.model.download import find_config, find_tokenizer
from qlora.model.meta_model import read_tokenizer
from qlora.model.new_tokens import add_tokens
from qlora.recipe.recipe import Recipe, from_mapping
from qlora.utils.atomic_files import read_json

SAMPLE_SIZE = 2_000  # records that are tokenized; a quantile of their lengths is exact to a percent or two
NO_LIMIT = 2**20  # tokens: examples are measured, not truncated


@dataclass(frozen=True)
class DatasetProfile:
    """A data set in the tokens of a model's tokenizer and template, estimated from a sample."""

    format: str
    records: int | None  # in all; None for a hub data set that was not read to its end
    sampled: int
    lengths: np.ndarray[Any, Any]  # tokens of each sampled example, ascending
    trained_share: float  # of the tokens
    report: DataReport
    context: int  # context length of the model, in tokens

    def length_quantile(self, share: float) -> int:
        """The length that `share` of the examples do not exceed."""
        return int(self.lengths[min(len(self.lengths) - 1, math.ceil(share * len(self.lengths)) - 1)])

    @property
    def tokens(self) -> int:
        """Tokens of the data set, extrapolated from the sample."""
        return round(float(self.lengths.mean()) * (self.records or self.sampled))


def profile_dataset(model: str, data: str) -> DatasetProfile:
    """Read a sample of the records as in training. BaseModelError without a tokenizer, DataError without an example."""
    section = {"train": [{"path": data, "max_samples": SAMPLE_SIZE}], "eval_fraction": 0.0}
    recipe, _ = from_mapping({"model": model, "data": section | {"packing": False, "max_length": NO_LIMIT}})
    prepared = prepare(recipe.data, build_encoder(recipe), recipe.train.seed)
    report = prepared.report
    if not report.kept:
        findings = (*report.problems, *report.warnings)
        reason = next((f"{finding.where}: {finding.message}" for finding in findings), data)
        raise DataError(f"{reason}. None of the {report.rows:,} records that were read can be trained on.")
    lengths = np.sort(np.asarray([len(example) for example in prepared.train]))
    records = report.rows if report.rows < SAMPLE_SIZE else _count_records(recipe)
    share = report.trained_tokens / max(1, report.tokens)
    return DatasetProfile(_format(recipe), records, report.rows, lengths, share, report, context_length(model))


def build_encoder(recipe: Recipe, tokenizer: Any = None) -> Encoder:
    """The encoder of training, from the tokenizer's files alone: no weight is downloaded."""
    return Encoder(
        tokenizer or build_tokenizer(recipe),
        recipe.data.train_on,
        recipe.model.chat_template,
        recipe.data.control_strings,
        TemplateOptions(recipe.data.template_args, recipe.data.empty_thinking == "mask", recipe.data.thinking),
    )


def build_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer of training, with the recipe's new tokens."""
    tokenizer = read_tokenizer(find_tokenizer(recipe.model.name, recipe.model.revision))
    if recipe.adapter.new_tokens:
        rows = vocabulary_rows(recipe.model.name, recipe.model.revision)
        add_tokens(tokenizer, recipe.adapter.new_tokens, len(tokenizer) if rows is None else rows)
    return tokenizer


def vocabulary_rows(model: str, revision: str | None = None) -> int | None:
    """Rows of a model's embedding, from its config.json; None if it does not say."""
    config = read_json(find_config(model, revision))
    text = config.get("text_config")
    sizes = [part.get("vocab_size") for part in (text, config) if isinstance(part, dict)]
    return next((size for size in sizes if isinstance(size, int)), None)


def context_length(model: str, revision: str | None = None) -> int:
    """The context length of a model in tokens, from its config.json."""
    config = read_json(find_config(model, revision))
    text = config.get("text_config")
    length = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return length if isinstance(length, int) and length > 0 else NO_LIMIT


def _count_records(recipe: Recipe) -> int | None:
    """The number of records in local files; None for a hub data set, which is not downloaded for it."""
    (train,) = recipe.data.train
    section = train.model_copy(update={"max_samples": None})
    located = resolve_source(section)
    return None if located.hub else sum(1 for _ in source.read_records(section, located, (0, 0)))


def _format(recipe: Recipe) -> str:
    records = source.read_sources(recipe.data.train, 0)
    first = next((record for record in records if isinstance(record, Record)), None)
    return (detect_format(first) if first else None) or "auto"
