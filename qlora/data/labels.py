"""The label gate: what was read, kept and dropped and why, what is trained of it, and what to know before step 0."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from qlora.data.drafts import Encoded
from qlora.data.types import Example, Finding
from qlora.errors import DataError

FEW_ROWS = 100  # below, a LoRA learns the rows by heart within an epoch or two
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
    notes: list[str]  # how conversations are written
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


class Gate:
    """Counts rows as they pass; `where` stands for the data set as a whole in findings."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.rows = 0
        self.truncated = 0
        self.dropped: Counter[str] = Counter()
        self.problems: list[Finding] = []
        self.warnings: list[Finding] = []
        self.examples: list[Example] = []
        self.copies: list[int] = []
        self._open_ended: list[str] = []
        self._skipped: list[tuple[str, int]] = []
        self.control_rows = 0

    def drop(self, where: str, reason: str, detail: str, fatal: bool = False) -> None:
        """One row that is not trained, and why."""
        self.rows += 1
        self.dropped[reason] += 1
        message = f"dropped, {reason}: {detail}" if detail else f"dropped, {reason}"
        (self.problems if fatal else self.warnings).append(Finding(where, message))

    def keep(self, encoded: Encoded, copies: int) -> None:
        """One row that is trained `copies` times an epoch."""
        where = encoded.example.where
        self.rows += 1
        self.examples.append(encoded.example)
        self.copies.append(copies)
        if encoded.forged:
            self.control_rows += 1
            kinds = ", ".join(repr(text) for text in dict.fromkeys(encoded.forged))
            self.warnings.append(Finding(where, f"control strings in the text, kept as text: {kinds}"))
        if encoded.unknown:
            self.warnings.append(Finding(where, f"{encoded.unknown} trained tokens are unknown to the tokenizer"))
        if not encoded.ends:
            self._open_ended.append(where)
        if encoded.skipped:
            self._skipped.append((where, encoded.skipped))

    @property
    def end_trained(self) -> float:
        """Share of the kept rows that teach the model to stop."""
        return 1 - len(self._open_ended) / len(self.examples) if self.examples else 0.0

    def advice(self) -> list[Finding]:
        """What concerns many rows at once."""
        found = []
        if self._open_ended:
            found.append(self._many(self._open_ended, "rows end without a trained end token: the model may not stop"))
        if self._skipped:
            answers = sum(count for _, count in self._skipped)
            text = f"rows have answers ({answers} in all) that are not trained: the template rewrites them later on"
            found.append(self._many([where for where, _ in self._skipped], text))
        if 2 * self.control_rows > len(self.examples):
            text = "of the rows hold control strings; are they conversations written out already? Give them as messages"
            found.append(Finding(self.where, f"{self.control_rows} {text}"))
        if 0 < len(self.examples) < FEW_ROWS:
            found.append(
                Finding(self.where, f"{len(self.examples)} rows: will overfit; {FEW_ROWS} or more, or fewer epochs")
            )
        return found

    def fatal(self) -> list[Finding]:
        """Why nothing at all can be learnt, if so."""
        if not self.examples:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.most_common())
            return [Finding(self.where, f"no rows left of {self.rows}: {reasons or 'the data set is empty'}")]
        if not any(example.trained_tokens() for example in self.examples):
            return [Finding(self.where, "no trained tokens in any row")]
        return []

    def _many(self, places: Sequence[str], text: str) -> Finding:
        shown = ", ".join(places[:_SHOWN])
        return Finding(self.where, f"{len(places)} {text} ({shown}{', ...' if len(places) > _SHOWN else ''})")


def digests(examples: Sequence[Example]) -> list[bytes]:
    """A key for what each example says: rows with equal keys have the same tokens and labels."""
    return [blake2b(e.input_ids.tobytes() + e.labels.tobytes(), digest_size=16).digest() for e in examples]


def repeats(keys: Sequence[bytes], examples: Sequence[Example]) -> tuple[int, list[Finding]]:
    """How many rows say the same as an earlier one, and a finding that names some."""
    first: dict[bytes, str] = {}
    pairs = [(e.where, first.setdefault(key, e.where)) for key, e in zip(keys, examples, strict=True)]
    again = [(later, earlier) for later, earlier in pairs if later != earlier]
    if not again:
        return 0, []
    shown = ", ".join(f"{later} = {earlier}" for later, earlier in again[:_SHOWN])
    return len(again), [Finding(again[0][0], f"{len(again)} rows repeat an earlier one ({shown})")]


def histogram(examples: Sequence[Example]) -> dict[str, int]:
    """Rows by their tokens: `<=64` counts those of 33 to 64 tokens."""
    if not examples:
        return {}
    exponents = np.ceil(np.log2([max(len(example), 1) for example in examples])).astype(int)
    return {f"<={2 ** int(e)}": int((exponents == e).sum()) for e in range(exponents.min(), exponents.max() + 1)}


def truncate(example: Example, length: int) -> Example:
    """The first `length` tokens of an example."""
    return Example(example.where, example.input_ids[:length], example.labels[:length])
