"""Data preparation: the `data` section of a recipe -> training sequences, evaluation examples and a report.

The steps: read records, encode them, filter, store, split off the evaluation examples, pack. The result is cached.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from qlora.data import data_report
from qlora.data.answer_counter import AnswerCounter
from qlora.data.batching import cache
from qlora.data.batching.column_store import Array, Columns
from qlora.data.batching.dataset import EXAMPLE_COLUMNS, ExampleStore, ExampleWriter, SequenceDataset
from qlora.data.batching.eval_split import eval_mask, nothing_held_out
from qlora.data.batching.filter import ExampleFilter, filter_example
from qlora.data.batching.packing import Indices, best_fit
from qlora.data.conversations import worker_pool
from qlora.data.conversations.build_example import Encoded
from qlora.data.conversations.encode_records import encode_records
from qlora.data.conversations.encoder import Encoder
from qlora.data.data_report import DataReport
from qlora.data.data_sets import DataSet, count_records, read_data_sets, require_unchanged
from qlora.data.reading import source
from qlora.data.types import Example, Finding
from qlora.data.warnings import data_set_warnings
from qlora.errors import DataError

if TYPE_CHECKING:
    from qlora.data import Data

_Form = tuple[bool, str | None]  # shares_prefixes and sided_format of `prepare`
Progress = Callable[[int, int | None], None]  # called with the records read so far, and all of them if it is known

_SEQUENCE_COLUMNS = ("train_order", "train_ends", "eval_order", "eval_ends")
_PROGRESS_RECORDS = 256  # records between two calls of Progress


@dataclass(frozen=True)
class Prepared:
    """Training sequences (packed if the recipe says so), evaluation examples (never packed), and the report."""

    train: Sequence[Example]
    eval: Sequence[Example]
    report: DataReport


def prepare(
    section: "Data",
    encoder: Encoder,
    seed: int,
    progress: Progress = lambda records, total: None,
    shares_prefixes: bool = True,
    sided_format: str | None = None,
) -> Prepared:
    """Prepare data, or read it from the cache. DataError for a missing or empty source; the report has the rest.

    shares_prefixes: whether the model trains prefix trees; else each answer of a tree is an example of its own.
    sided_format: what every record is read as, for an objective that compares answers; None: data.format.
    Memory stays bounded: examples are written to files and read through a memory map.
    """
    data_sets, form = read_data_sets(section), (shares_prefixes, sided_format)
    sha256 = hashlib.sha256(" ".join(" ".join(data_set.digests) for data_set in data_sets).encode()).hexdigest()

    def build(columns: Columns) -> tuple[Mapping[str, Array], Mapping[str, object]]:
        arrays, report = _Preparation(section, encoder, seed, progress, form).run(data_sets, columns)
        require_unchanged(data_sets)
        return arrays, replace(report, sha256=sha256).as_json()

    entry = cache.get_or_build(_cache_key(section, encoder, seed, data_sets, form), build)
    examples = ExampleStore(entry.columns)
    train, evaluation = (
        SequenceDataset(examples, entry.columns[f"{name}_order"], entry.columns[f"{name}_ends"])
        for name in ("train", "eval")
    )
    report = DataReport.from_json(entry.report)
    return Prepared(train, evaluation, replace(report, notes=[*encoder.notes, *report.notes, entry.note]))


def _cache_key(section: "Data", encoder: Encoder, seed: int, data_sets: Sequence[DataSet], form: _Form) -> str:
    """The cache key: a digest of everything that the result depends on."""
    return cache.cache_key(
        section=section.model_dump(mode="json"),
        encoder=encoder.sha256,
        seed=seed,
        form=form,
        content=[data_set.digests for data_set in data_sets],
        files=[[location.files for location in data_set.resolved] for data_set in data_sets],
        found=[
            [[f.where, f.message] for f in location.findings]
            for data_set in data_sets
            for location in data_set.resolved
        ],
    )


class _Preparation:
    """All records of data.train and data.eval, filtered into one store of examples, then split and packed."""

    def __init__(self, section: "Data", encoder: Encoder, seed: int, progress: Progress, form: _Form) -> None:
        self._section, self._encoder, self._seed, self._progress = section, encoder, seed, progress
        self._shares_prefixes, self._sided_format = form
        self._records = 0
        self._total: int | None = None
        self._answers = AnswerCounter()
        self._workers = worker_pool.available_workers()

    def run(self, data_sets: tuple[DataSet, DataSet], columns: Columns) -> tuple[dict[str, Array], DataReport]:
        """Fill `columns`; returns them as arrays, with the report."""
        self._total = count_records(data_sets)
        writer = ExampleWriter(columns)
        training, evaluation = (self._filter(data_set, ExampleFilter(data_set.key, writer)) for data_set in data_sets)
        arrays = columns.finish(EXAMPLE_COLUMNS)
        examples = ExampleStore(arrays)
        held_out, pieces = self._hold_out(training), np.asarray(training.pieces)
        eval_mask_of_examples, copies = np.repeat(held_out, pieces), np.repeat(np.asarray(training.copies), pieces)
        train_order = np.repeat(np.flatnonzero(~eval_mask_of_examples), copies[~eval_mask_of_examples])
        eval_order = np.flatnonzero(eval_mask_of_examples)
        if self._section.eval is not None:
            eval_order = pieces.sum() + np.arange(sum(evaluation.pieces))
        train_order, train_ends = self._pack(train_order, examples)
        values = (train_order, train_ends, eval_order, 1 + np.arange(len(eval_order)))
        for name, column in zip(_SEQUENCE_COLUMNS, values, strict=True):
            columns.append(name, column)
        report = _report(training, evaluation, held_out, examples)
        counts, first = self._answers, [Finding(training.where, text) for text in self._answers.warnings()]
        report = replace(
            report,
            eval_rows=len(eval_order),
            packed_rows=len(train_ends),
            warnings=[*first, *report.warnings],
            answers=counts.answers,
            trained_answers=counts.trained_answers,
            thoughts=counts.thoughts,
            trained_thoughts=counts.trained_thoughts,
        )
        return arrays | columns.finish(_SEQUENCE_COLUMNS), report

    def _hold_out(self, training: ExampleFilter) -> Array:
        """True for each kept record that is held out of training; a warning if none is, although some should be."""
        fraction, keys = self._section.eval_fraction, np.asarray(training.keys, dtype=np.uint64)
        if self._section.eval is not None or not fraction or not training.kept:
            return np.zeros(training.kept, dtype=bool)
        pieces = np.asarray(training.pieces, dtype=np.int64)
        held_out = eval_mask(keys, pieces, fraction, self._seed)
        if not held_out.any():
            training.warnings.append(Finding("data.eval_fraction", nothing_held_out(keys, pieces, fraction)))
        return held_out

    def _pack(self, order: Indices, examples: ExampleStore) -> tuple[Indices, Indices]:
        if not self._section.packing:
            return order, 1 + np.arange(len(order))
        packed, ends = best_fit(examples.lengths[order], self._section.max_length)
        return order[packed], ends

    def _filter(self, data_set: DataSet, examples: ExampleFilter) -> ExampleFilter:
        """Encode and filter every record of a data set."""
        for index, (item, resolved) in enumerate(zip(data_set.sources, data_set.resolved, strict=True)):
            examples.warnings.extend(resolved.findings)
            before = examples.records
            records = source.read_records(item, resolved, (self._seed, index))
            kind = self._sided_format or item.format or self._section.format
            for record, result in encode_records(records, kind, self._encoder, self._workers):
                kept, left_out = examples.kept, examples.overlong_answers
                filter_example(examples, record, result, self._section, self._shares_prefixes)
                if isinstance(result, Encoded) and examples.kept > kept and data_set.key == "data.train":
                    self._answers.add(result, examples.overlong_answers - left_out)
                self._count()
            if examples.records == before:
                raise DataError(f"{item.path}: no records in this data set. {data_set.key} needs at least one.")
        return examples

    def _count(self) -> None:
        self._records += 1
        if self._records % _PROGRESS_RECORDS == 0:
            self._progress(self._records, self._total)


def _report(training: ExampleFilter, evaluation: ExampleFilter, held_out: Array, examples: ExampleStore) -> DataReport:
    keys, eval_keys = np.asarray(training.keys, dtype=np.uint64), np.asarray(evaluation.keys, dtype=np.uint64)
    pieces = np.asarray(training.pieces, dtype=np.int64)
    first_pieces = np.cumsum(pieces) - pieces
    duplicates, repeated = data_report.find_duplicates(keys, lambda record: examples.where(int(first_pieces[record])))
    overlap = int(np.isin(np.concatenate([eval_keys, keys[held_out]]), keys[~held_out]).sum())
    leaked = (
        [Finding("data.eval", f"{overlap} held-out records are in the training set too. Remove them from one of them")]
        if overlap
        else []
    )
    blocking = [*training.blocking_problems(), *(evaluation.blocking_problems() if evaluation.records else [])]
    lengths = examples.lengths[: pieces.sum()]
    warnings = data_set_warnings(training, lengths)
    warnings += [Finding(evaluation.where, text) for text in evaluation.unused.warnings()]
    return DataReport(
        rows=training.records,
        kept=training.kept,
        dropped=dict(training.dropped),
        tokens=training.tokens,
        trained_tokens=training.trained_tokens,
        problems=[*training.problems, *evaluation.problems, *blocking],
        warnings=[*warnings, *training.warnings, *evaluation.warnings, *repeated, *leaked],
        sha256="",
        notes=[*training.unused.note(training.where), *evaluation.unused.note(evaluation.where)],
        truncated=training.truncated,
        split=training.split,
        pieces=int(pieces[pieces > 1].sum()),
        end_trained=training.end_trained,
        trees=training.trees,
        tokens_of_trees=training.tokens_of_trees,
        tokens_of_paths=training.tokens_of_paths,
        control_rows=training.control_records,
        duplicates=duplicates,
        overlap=overlap,
        lengths=data_report.length_histogram(_record_lengths(lengths, pieces)),
    )


def _record_lengths(lengths: Indices, pieces: Indices) -> Indices:
    """Tokens of each record from those of its pieces: each but the first repeats one token of the piece before it."""
    if not len(pieces):
        return lengths
    return np.add.reduceat(lengths, np.cumsum(pieces) - pieces) - (pieces - 1)  # type: ignore[no-any-return]
