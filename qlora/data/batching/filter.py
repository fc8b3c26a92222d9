"""The gate that every row passes: kept, cut or dropped, counted, and named where there is something to tell."""

from array import array
from collections import Counter
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING

from qlora.data.batching.dataset import ExampleWriter
from qlora.data.conversations.build_example import Encoded
from qlora.data.conversations.encode_records import Made, RawRecord
from qlora.data.types import IGNORED, BadRecord, Example, Finding, Ints, Occurrences, Record, RecordError

if TYPE_CHECKING:
    from qlora.data import Data


class ExampleFilter:
    """Counts rows as they pass on to `documents`; `where` stands for the data set as a whole in findings.

    Of a row that is kept, 24 bytes stay here: its length is in `documents`, `keys` and `copies` are kept for the split.
    """

    def __init__(self, where: str, documents: ExampleWriter) -> None:
        self.where = where
        self.rows = self.kept = self.truncated = self.control_rows = 0
        self.tokens = self.trained_tokens = 0
        self.dropped: Counter[str] = Counter()
        self.problems: list[Finding] = []
        self.warnings: list[Finding] = []
        self.keys = array("Q")  # rows with equal keys say the same
        self.copies = array("q")
        self.answers = array("Q")  # rows with equal ones are trained to say the same
        self.too_long = array("q")  # tokens of rows above data.max_length
        self.open_ended = Occurrences()
        self.skipped = Occurrences()
        self.skipped_answers = 0
        self._documents = documents

    def drop(self, where: str, reason: str, detail: str, fatal: bool = False) -> None:
        """One row that is not trained, and why."""
        self.rows += 1
        self.dropped[reason] += 1
        message = f"dropped, {reason}: {detail}" if detail else f"dropped, {reason}"
        (self.problems if fatal else self.warnings).append(Finding(where, message))

    def keep(self, encoded: Encoded, copies: int) -> None:
        """One row that is trained `copies` times an epoch."""
        example = encoded.example
        self.rows += 1
        self.kept += 1
        self.tokens += len(example)
        self.trained_tokens += example.trained_tokens()
        self.keys.append(_key(example.input_ids, example.labels))
        self.answers.append(_key(example.labels[example.labels != IGNORED]))
        self.copies.append(copies)
        self._documents.add(example)
        self._notice(encoded)

    def _notice(self, encoded: Encoded) -> None:
        """What a kept row gives reason to tell."""
        where = encoded.example.where
        if encoded.forged:
            self.control_rows += 1
            kinds = ", ".join(repr(text) for text in dict.fromkeys(encoded.forged))
            self.warnings.append(Finding(where, f"control strings in the text, kept as text: {kinds}"))
        if encoded.unknown:
            self.warnings.append(Finding(where, f"{encoded.unknown} trained tokens are unknown to the tokenizer"))
        if not encoded.ends:
            self.open_ended.add(where)
        if encoded.skipped:
            self.skipped.add(where)
            self.skipped_answers += encoded.skipped

    @property
    def end_trained(self) -> float:
        """Share of the kept rows that teach the model to stop."""
        return 1 - self.open_ended.count / self.kept if self.kept else 0.0

    def fatal(self) -> list[Finding]:
        """Why nothing at all can be learnt, if so."""
        if not self.kept:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.most_common())
            found = f"no rows left of {self.rows}: {reasons or 'the data set is empty'}"
            return [Finding(self.where, f"{found}. {self._first_reason()}")]
        if not self.trained_tokens:
            return [Finding(self.where, "no trained tokens in any row")]
        return []

    def _first_reason(self) -> str:
        """The first row that was dropped, which says what to do about all of them."""
        dropped = next((finding for finding in self.warnings if finding.message.startswith("dropped")), None)
        return f"First: {dropped.where}: {dropped.message}." if dropped else "Name a file with rows."


def _key(*said: Ints) -> int:
    """64 bits of what the arrays say: equal for equal ones."""
    digest = blake2b(b"".join(one.tobytes() for one in said), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def admit(gate: ExampleFilter, row: RawRecord, made: Made, section: "Data") -> None:
    """Keep, cut or drop one row."""
    if isinstance(row, BadRecord):
        gate.drop(row.where, row.reason, row.detail, fatal=True)
    elif isinstance(made, RecordError):
        gate.drop(row.where, made.reason, made.detail)
    elif made is not None and len(made.example) <= section.max_length:
        gate.keep(made, row.copies)
    elif made is not None:
        _overlong(gate, row, made, section)


def _overlong(gate: ExampleFilter, row: Record, made: Encoded, section: "Data") -> None:
    found = f"{len(made.example)} tokens, data.max_length is {section.max_length}"
    gate.too_long.append(len(made.example))
    short = _truncated(made.example, section.max_length)
    if section.overlong != "truncate":
        gate.drop(row.where, "overlong", found, fatal=section.overlong == "error")
    elif not short.trained_tokens():
        gate.drop(row.where, "nothing left to train", f"{found}, and what is trained comes after")
    else:
        gate.truncated += 1
        gate.warnings.append(Finding(row.where, f"truncated: {found}"))
        gate.keep(replace(made, example=short, ends=False), row.copies)


def _truncated(example: Example, length: int) -> Example:
    """The first `length` tokens of an example."""
    return Example(example.where, example.input_ids[:length], example.labels[:length])
