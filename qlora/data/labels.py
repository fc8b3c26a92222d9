"""The label gate: what was read, kept and dropped and why, what is trained of it, and what to know before step 0."""

from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora.data.drafts import Encoded
from qlora.data.rows import DocumentWriter
from qlora.data.types import Example, Finding
from qlora.errors import DataError

FEW_ROWS = 100  # below, a LoRA learns the rows by heart within an epoch or two
Keys = npt.NDArray[np.uint64]

_SHOWN = 5  # places named in a finding about many rows


@dataclass(frozen=True)
class DataReport:
    """What became of the rows. `problems` stop a run; everything else is for the user to judge.

    Counts are of the rows of data.train, held-out ones included, each counted once whatever its weight. Every dropped
    row of data.train and data.eval is named in `problems` (lines that can't be read) or in `warnings` (the others).
    """

    rows: int
    kept: int
    dropped: dict[str, int]
    tokens: int
    trained_tokens: int
    problems: list[Finding]
    warnings: list[Finding]
    sha256: str
    notes: list[str]  # how conversations are written, and whether the rows were prepared before
    eval_rows: int = 0  # of data.eval, or held out of data.train
    truncated: int = 0
    end_trained: float = 1.0  # share of kept rows whose last trained token is an end token
    control_rows: int = 0  # rows with control strings in their text
    duplicates: int = 0  # rows that say the same as an earlier one
    overlap: int = 0  # held-out rows that stand in the training set as well
    lengths: dict[str, int] = field(default_factory=dict)  # rows by tokens, in powers of two
    packed_rows: int = 0  # rows of max_length that the training set makes

    def refuse(self) -> None:
        """DataError with the problems, if there are any."""
        if self.problems:
            shown = [f"{finding.where}: {finding.message}" for finding in self.problems[:_SHOWN]]
            more = len(self.problems) - len(shown)
            tail = [f"and {more} more; `qlora check` names them all"] if more else []
            raise DataError("\n".join([*shown, *tail]))

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "DataReport":
        """The report that `as_json` wrote. TypeError or KeyError for anything else."""
        found = {name: [Finding(**one) for one in value[name]] for name in ("problems", "warnings")}
        return cls(**{**value, **found})


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
            return [Finding(self.where, f"no rows left of {self.rows}: {reasons or 'the data set is empty'}")]
        if not self.trained_tokens:
            return [Finding(self.where, "no trained tokens in any row")]
        return []


class _Places:
    """How many rows something was seen in, and the first few of them."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[str] = []

    def add(self, where: str) -> None:
        self.count += 1
        if len(self._first) <= _SHOWN:
            self._first.append(where)

    def told(self, text: str) -> str:
        more = ", ..." if self.count > _SHOWN else ""
        return f"{self.count} {text} ({', '.join(self._first[:_SHOWN])}{more})"


def key_of(example: Example) -> int:
    """64 bits of what an example says: rows with equal keys have the same tokens and labels."""
    said = blake2b(example.input_ids.tobytes() + example.labels.tobytes(), digest_size=16)
    return int.from_bytes(said.digest()[:8], "little")


def repeats(keys: Keys, where: Callable[[int], str]) -> tuple[int, list[Finding]]:
    """How many rows say the same as an earlier one, and a finding that names some; `where` gives a row's place."""
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    later = np.flatnonzero(first[which] != np.arange(len(keys)))
    pairs = ((where(int(row)), where(int(first[which[row]]))) for row in later)
    again = [f"{place} = {earlier}" for place, earlier in pairs if place != earlier]
    if not again:
        return 0, []
    found = Finding(again[0].split(" = ")[0], f"{len(again)} rows repeat an earlier one ({', '.join(again[:_SHOWN])})")
    return len(again), [found]


def histogram(lengths: npt.NDArray[np.int64]) -> dict[str, int]:
    """Rows by their tokens: `<=64` counts those of 33 to 64 tokens."""
    if not len(lengths):
        return {}
    exponents = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    return {f"<={2 ** int(e)}": int((exponents == e).sum()) for e in range(exponents.min(), exponents.max() + 1)}


def truncate(example: Example, length: int) -> Example:
    """The first `length` tokens of an example."""
    return Example(example.where, example.input_ids[:length], example.labels[:length])
