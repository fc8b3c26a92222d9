"""The gate that every row passes: kept, cut or dropped, counted, and named where there is something to tell."""

from array import array
from collections import Counter
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING

from qlora.data.drafts import Encoded
from qlora.data.encoding import Made, Raw
from qlora.data.rows import DocumentWriter
from qlora.data.types import BadRow, Example, Finding, Row, RowError

if TYPE_CHECKING:
    from qlora.data import Data

FEW_ROWS = 100  # below, a LoRA learns the rows by heart within an epoch or two
SHOWN = 5  # places named in a finding about many rows


class Gate:
    """Counts rows as they pass on to `documents`; `where` stands for the data set as a whole in findings.

    Of a row that is kept, 16 bytes stay here: its length is in `documents`, `keys` and `copies` are kept for the split.
    """

    def __init__(self, where: str, documents: DocumentWriter) -> None:
        self.where = where
        self.rows = self.kept = self.truncated = self.control_rows = 0
        self.tokens = self.trained_tokens = 0
        self.dropped: Counter[str] = Counter()
        self.problems: list[Finding] = []
        self.warnings: list[Finding] = []
        self.keys = array("Q")  # rows with equal keys say the same
        self.copies = array("q")
        self._documents = documents
        self._open_ended = _Places()
        self._skipped = _Places()
        self._skipped_answers = 0

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
        self.keys.append(key_of(example))
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
            self._open_ended.add(where)
        if encoded.skipped:
            self._skipped.add(where)
            self._skipped_answers += encoded.skipped

    @property
    def end_trained(self) -> float:
        """Share of the kept rows that teach the model to stop."""
        return 1 - self._open_ended.count / self.kept if self.kept else 0.0

    def advice(self) -> list[Finding]:
        """What concerns many rows at once."""
        found = []
        if self._open_ended.count:
            text = "rows end without a trained end token: the model may not stop"
            found.append(Finding(self.where, self._open_ended.told(text)))
        if self._skipped.count:
            text = f"rows have answers ({self._skipped_answers} in all) that are not trained: "
            text += "the template rewrites them later on"
            found.append(Finding(self.where, self._skipped.told(text)))
        if 2 * self.control_rows > self.kept:
            text = "of the rows hold control strings; are they conversations written out already? Give them as messages"
            found.append(Finding(self.where, f"{self.control_rows} {text}"))
        if 0 < self.kept < FEW_ROWS:
            found.append(Finding(self.where, f"{self.kept} rows: will overfit; {FEW_ROWS} or more, or fewer epochs"))
        return found

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


class _Places:
    """How many rows something was seen in, and the first few of them."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[str] = []

    def add(self, where: str) -> None:
        self.count += 1
        if len(self._first) <= SHOWN:
            self._first.append(where)

    def told(self, text: str) -> str:
        more = ", ..." if self.count > SHOWN else ""
        return f"{self.count} {text} ({', '.join(self._first[:SHOWN])}{more})"


def key_of(example: Example) -> int:
    """64 bits of what an example says: rows with equal keys have the same tokens and labels."""
    said = blake2b(example.input_ids.tobytes() + example.labels.tobytes(), digest_size=16)
    return int.from_bytes(said.digest()[:8], "little")


def admit(gate: Gate, row: Raw, made: Made, section: "Data") -> None:
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
