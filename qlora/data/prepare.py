"""Section in, examples out: rows read, formatted, encoded, gated, split and packed. The room's walk."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import numpy as np

from qlora.data import FORMATS, batches, labels, source
from qlora.data.drafts import Encoded
from qlora.data.labels import DataReport, Gate
from qlora.data.packing import pack
from qlora.data.places import locate
from qlora.data.tokens import Encoder
from qlora.data.types import BadRow, Example, Finding, Message, Row, RowError
from qlora.errors import DataError

if TYPE_CHECKING:
    from qlora.data import Data, Source

_CHUNK = 512  # rows encoded together
_AUTO = ("tokens", "messages", "sharegpt", "alpaca", "completion", "text")  # the most telling columns first


class Format(Protocol):
    """What a file of formats/ gives."""

    def matches(self, fields: Mapping[str, object]) -> bool:
        """Whether the columns are those of this format."""

    def messages(self, row: Row) -> list[Message]:
        """The messages that `row` stands for. RowError if it can't be read."""


@dataclass(frozen=True)
class Prepared:
    """Training rows (packed if asked for), held-out rows (never packed), and what became of the data."""

    train: Sequence[Example]
    eval: Sequence[Example]
    report: DataReport


def prepare(section: "Data", encoder: Encoder, seed: int) -> Prepared:
    """Read, encode and gate all rows. DataError for missing or empty sources; anything else is in the report."""
    gate, digest = _gathered("data.train", section.train, section, encoder, seed)
    held, held_digest = _gathered("data.eval", section.eval or (), section, encoder, seed)
    keys = labels.digests(gate.examples)
    picked = _held_out(keys, section.eval_fraction, seed) if section.eval is None else set[int]()
    train = [e for i, e in enumerate(gate.examples) for _ in range(gate.copies[i]) if i not in picked]
    evaluation = held.examples if section.eval is not None else [gate.examples[i] for i in sorted(picked)]
    rows = pack(train, section.max_length) if section.packing else train
    sha256 = hashlib.sha256(f"{digest} {held_digest}".encode()).hexdigest()
    report = _report(gate, held, keys, picked, sha256)
    report = replace(report, eval_rows=len(evaluation), packed_rows=len(rows), notes=list(encoder.notes))
    return Prepared(rows, evaluation, report)


def messages_of(row: Row, kind: str) -> list[Message]:
    """The messages of `row` read as format `kind`, or, for auto, as the first format that has its columns. RowError."""
    if kind != "auto":
        return _format(kind).messages(row)
    for name in _AUTO:
        if _format(name).matches(row.fields):
            return _format(name).messages(row)
    columns = ", ".join(str(name) for name in row.fields)
    raise RowError("no known format", f"columns {columns or '(none)'}; name data.format or map data.train.columns")


def encoded_rows(
    rows: Iterator[Row | BadRow], kind: str, encoder: Encoder, chunk_rows: int = _CHUNK
) -> Iterator[tuple[Row | BadRow, Encoded | RowError | None]]:
    """Each row with what it became: encoded, or the reason why not; None for a line that could not be read."""
    while chunk := list(islice(rows, chunk_rows)):
        read = [_read(row, kind) if isinstance(row, Row) else None for row in chunk]
        items = [(row.where, m) for row, m in zip(chunk, read, strict=True) if isinstance(m, list)]
        made = iter(encoder.encode_all(items))
        yield from ((row, next(made) if isinstance(m, list) else m) for row, m in zip(chunk, read, strict=True))


@cache
def _format(kind: str) -> Format:
    made: Format = FORMATS[kind]()
    return made


def _read(row: Row, kind: str) -> list[Message] | RowError:
    try:
        return messages_of(row, kind)
    except RowError as error:
        return error


def _gathered(
    where: str, sources: "Sequence[Source]", section: "Data", encoder: Encoder, seed: int
) -> tuple[Gate, str]:
    """All sources of one key through one gate, with the digest of their content."""
    gate, digests = Gate(where), []
    for index, one in enumerate(sources):
        located = locate(one)
        gate.warnings.extend(located.findings)
        before = gate.rows
        rows = source.read(one, located, (seed, index))
        for row, made in encoded_rows(rows, one.format or section.format, encoder):
            _pass(gate, row, made, section, encoder)
        if gate.rows == before:
            raise DataError(f"{one.path}: no rows in this data set. {where} needs at least one.")
        digests.append(source.sha256(one, located))
    return gate, " ".join(digests)


def _pass(gate: Gate, row: Row | BadRow, made: Encoded | RowError | None, section: "Data", encoder: Encoder) -> None:
    """Keep, cut or drop one row."""
    if isinstance(row, BadRow):
        gate.drop(row.where, row.reason, row.detail, fatal=True)
    elif isinstance(made, RowError):
        gate.drop(row.where, made.reason, made.detail)
    elif made is not None and len(made.example) <= section.max_length:
        gate.keep(made, row.copies)
    elif made is not None:
        _overlong(gate, row, made, section)


def _overlong(gate: Gate, row: Row, made: Encoded, section: "Data") -> None:
    found = f"{len(made.example)} tokens, data.max_length is {section.max_length}"
    short = labels.truncate(made.example, section.max_length)
    if section.overlong != "truncate":
        gate.drop(row.where, "overlong", found, fatal=section.overlong == "error")
    elif not short.trained_tokens():
        gate.drop(row.where, "nothing left to train", f"{found}, and what is trained comes after")
    else:
        gate.truncated += 1
        gate.warnings.append(Finding(row.where, f"truncated: {found}"))
        gate.keep(replace(made, example=short, ends=False), row.copies)


def _held_out(keys: Sequence[bytes], fraction: float, seed: int) -> set[int]:
    """Which rows are held out: about `fraction` of them, at least one of two. Rows that say the same stay together."""
    if fraction <= 0 or len(keys) < 2:
        return set()
    wanted = min(max(1, round(fraction * len(keys))), len(keys) - 1)
    groups: dict[bytes, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    numbers = np.array([int.from_bytes(key[:8], "little") for key in groups], dtype=np.uint64)
    picked: set[int] = set()
    order, members = np.argsort(batches.scatter(seed, 0, numbers), kind="stable"), list(groups.values())
    for group in (members[place] for place in order):
        if len(picked) + len(group) <= wanted:
            picked.update(group)
    return picked


def _report(gate: Gate, held: Gate, keys: Sequence[bytes], picked: set[int], sha256: str) -> DataReport:
    duplicates, repeated = labels.repeats(keys, gate.examples)
    in_training = {key for i, key in enumerate(keys) if i not in picked}
    held_keys = [*labels.digests(held.examples), *(keys[i] for i in sorted(picked))]
    overlap = sum(key in in_training for key in held_keys)
    told = [Finding("data.eval", f"{overlap} held-out rows stand in the training set as well")] if overlap else []
    needed = [*gate.fatal(), *(held.fatal() if held.rows else [])]
    return DataReport(
        rows=gate.rows,
        kept=len(gate.examples),
        dropped=dict(gate.dropped),
        tokens=sum(len(example) for example in gate.examples),
        trained_tokens=sum(example.trained_tokens() for example in gate.examples),
        problems=[*gate.problems, *held.problems, *needed],
        warnings=[*gate.warnings, *held.warnings, *gate.advice(), *repeated, *told],
        sha256=sha256,
        notes=[],
        truncated=gate.truncated,
        end_trained=gate.end_trained,
        control_rows=gate.control_rows,
        duplicates=duplicates,
        overlap=overlap,
        lengths=labels.histogram(gate.examples),
    )
