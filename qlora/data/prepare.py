"""Section in, examples out: rows read, formatted, encoded, gated, split and packed. The room's walk."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from qlora.data import data_report
from qlora.data.batching import cache
from qlora.data.batching.column_store import Array, Columns
from qlora.data.batching.dataset import DOCUMENTS, ExampleStore, ExampleWriter, SequenceDataset
from qlora.data.batching.eval_split import held_out
from qlora.data.batching.filter import ExampleFilter, admit
from qlora.data.batching.packing import Indices, arrange
from qlora.data.conversations import worker_pool
from qlora.data.conversations.encode_records import encoded_rows
from qlora.data.conversations.encoder import Encoder
from qlora.data.data_report import DataReport
from qlora.data.reading import source
from qlora.data.reading.resolve_paths import Located, locate
from qlora.data.types import Example, Finding
from qlora.data.warnings import advice
from qlora.errors import DataError

if TYPE_CHECKING:
    from qlora.data import Data, Source

Progress = Callable[[int], None]  # told how many rows have been read so far


@dataclass(frozen=True)
class Prepared:
    """Training rows (packed if asked for), held-out rows (never packed), and what became of the data."""

    train: Sequence[Example]
    eval: Sequence[Example]
    report: DataReport


@dataclass(frozen=True)
class _Set:
    """The sources of one key of the recipe, found; `digests` of what each holds."""

    name: str
    sources: "Sequence[Source]"
    located: list[Located]
    digests: list[str]


def prepare(section: "Data", encoder: Encoder, seed: int, progress: Progress = lambda rows: None) -> Prepared:
    """Read, encode and gate all rows, or find them prepared. DataError for missing or empty sources.

    Anything else is in the report. Memory does not grow with the rows: they are read through the memory map.
    """
    sets = _sets(section)
    report_sha256 = hashlib.sha256(" ".join(" ".join(one.digests) for one in sets).encode()).hexdigest()

    def build(columns: Columns) -> tuple[Mapping[str, Array], Mapping[str, object]]:
        walk = _Walk(section, encoder, seed, progress)
        found, report = walk.run(sets, columns)
        _refuse_changes(sets)
        return found, replace(report, sha256=report_sha256).as_json()

    known = cache.entry(_key(section, encoder, seed, sets), build)
    documents = ExampleStore(known.columns)
    train, evaluation = (
        SequenceDataset(documents, known.columns[f"{name}_order"], known.columns[f"{name}_ends"])
        for name in ("train", "eval")
    )
    report = DataReport.from_json(known.report)
    return Prepared(train, evaluation, replace(report, notes=[*encoder.notes, known.note]))


def _sets(section: "Data") -> tuple[_Set, _Set]:
    found = []
    for name, sources in (("data.train", section.train), ("data.eval", section.eval or ())):
        located = [locate(one) for one in sources]
        digests = [source.sha256(one, place) for one, place in zip(sources, located, strict=True)]
        found.append(_Set(name, sources, located, digests))
    return found[0], found[1]


def _key(section: "Data", encoder: Encoder, seed: int, sets: Sequence[_Set]) -> str:
    """What names this data in the cache: everything that the result depends on."""
    return cache.key_of(
        section=section.model_dump(mode="json"),
        encoder=encoder.sha256,
        seed=seed,
        content=[one.digests for one in sets],
        files=[[place.files for place in one.located] for one in sets],
        found=[[[f.where, f.message] for f in place.findings] for one in sets for place in one.located],
    )


def _refuse_changes(sets: Sequence[_Set]) -> None:
    """DataError if a file is not the one any more that `sets` has the digest of."""
    for one in sets:
        for src, place, digest in zip(one.sources, one.located, one.digests, strict=True):
            if place.files and source.sha256(src, place) != digest:
                raise DataError(f"{src.path}: changed while it was read. Start again when nothing writes to it.")


class _Walk:
    """All rows of all sources through two gates into one store of documents, then split and packed."""

    def __init__(self, section: "Data", encoder: Encoder, seed: int, progress: Progress) -> None:
        self._section, self._encoder, self._seed, self._progress = section, encoder, seed, progress
        self._rows = 0
        self._crew = worker_pool.available()

    def run(self, sets: tuple[_Set, _Set], columns: Columns) -> tuple[dict[str, Array], DataReport]:
        """Fill `columns`; returns them for reading, with the report."""
        writer = ExampleWriter(columns)
        gate, held = (self._gathered(one, ExampleFilter(one.name, writer)) for one in sets)
        found = columns.finish(DOCUMENTS)
        documents = ExampleStore(found)
        keys = np.asarray(gate.keys, dtype=np.uint64)
        picked = np.zeros(gate.kept, dtype=bool)
        if self._section.eval is None:
            picked = held_out(keys, self._section.eval_fraction, self._seed)
        train = np.repeat(np.flatnonzero(~picked), np.asarray(gate.copies)[~picked])
        evaluation = np.flatnonzero(picked) if self._section.eval is None else gate.kept + np.arange(held.kept)
        order, ends = self._packed(train, documents)
        for name, values in zip(_PLAN, (order, ends, evaluation, 1 + np.arange(len(evaluation))), strict=True):
            columns.append(name, values)
        report = _report(gate, held, picked, documents)
        report = replace(report, eval_rows=len(evaluation), packed_rows=len(ends))
        return found | columns.finish(_PLAN), report

    def _packed(self, train: Indices, documents: ExampleStore) -> tuple[Indices, Indices]:
        if not self._section.packing:
            return train, 1 + np.arange(len(train))
        order, ends = arrange(documents.lengths[train], self._section.max_length)
        return train[order], ends

    def _gathered(self, one: _Set, gate: ExampleFilter) -> ExampleFilter:
        """The sources of one key, row by row."""
        for index, (src, place) in enumerate(zip(one.sources, one.located, strict=True)):
            gate.warnings.extend(place.findings)
            before = gate.rows
            rows = source.read(src, place, (self._seed, index))
            for row, made in encoded_rows(rows, src.format or self._section.format, self._encoder, self._crew):
                admit(gate, row, made, self._section)
                self._count()
            if gate.rows == before:
                raise DataError(f"{src.path}: no rows in this data set. {one.name} needs at least one.")
        return gate

    def _count(self) -> None:
        self._rows += 1
        if self._rows % _REPORT_ROWS == 0:
            self._progress(self._rows)


_PLAN = ("train_order", "train_ends", "eval_order", "eval_ends")
_REPORT_ROWS = 256


def _report(gate: ExampleFilter, held: ExampleFilter, picked: Array, documents: ExampleStore) -> DataReport:
    keys, held_keys = np.asarray(gate.keys, dtype=np.uint64), np.asarray(held.keys, dtype=np.uint64)
    duplicates, repeated = data_report.repeats(keys, documents.where)
    overlap = int(np.isin(np.concatenate([held_keys, keys[picked]]), keys[~picked]).sum())
    told = [Finding("data.eval", f"{overlap} held-out rows stand in the training set as well")] if overlap else []
    needed = [*gate.fatal(), *(held.fatal() if held.rows else [])]
    return DataReport(
        rows=gate.rows,
        kept=gate.kept,
        dropped=dict(gate.dropped),
        tokens=gate.tokens,
        trained_tokens=gate.trained_tokens,
        problems=[*gate.problems, *held.problems, *needed],
        warnings=[*gate.warnings, *held.warnings, *advice(gate, documents.lengths[: gate.kept]), *repeated, *told],
        sha256="",
        notes=[],
        truncated=gate.truncated,
        end_trained=gate.end_trained,
        control_rows=gate.control_rows,
        duplicates=duplicates,
        overlap=overlap,
        lengths=data_report.histogram(documents.lengths[: gate.kept]),
    )
