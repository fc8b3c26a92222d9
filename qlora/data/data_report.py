"""The report: what was read, kept and dropped and why, what is trained of it, and what to know before step 0."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora.data.types import SHOWN, Finding, counted
from qlora.errors import DataError

Keys = npt.NDArray[np.uint64]


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
            shown = [f"{finding.where}: {finding.message}" for finding in self.problems[:SHOWN]]
            more = len(self.problems) - len(shown)
            tail = [f"and {more} more; `qlora check --json` names each"] if more else []
            tail += ["Nothing was trained. Mend these, or take them out, and start again."]
            raise DataError("\n".join([*shown, *tail]))

    def counts(self) -> dict[str, Any]:
        """The figures without the findings: what run.json keeps."""
        return {name: value for name, value in asdict(self).items() if name not in ("problems", "warnings", "notes")}

    def summary(self) -> list[str]:
        """The figures for people, in a few lines."""
        share = self.trained_tokens / self.tokens if self.tokens else 0.0
        found = [
            f"{self.kept:,} of {self.rows:,} rows kept, {self.trained_tokens:,} of {self.tokens:,} tokens trained "
            f"({share:.1%}), the end token in {self.end_trained:.1%} of the rows",
            "tokens a row: " + ", ".join(f"{size} {rows:,}" for size, rows in self.lengths.items()),
            f"{counted(self.packed_rows)} to train on, {self.eval_rows:,} held out",
        ]
        return found if self.kept else found[:1]

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "DataReport":
        """The report that `as_json` wrote. TypeError or KeyError for anything else."""
        found = {name: [Finding(**one) for one in value[name]] for name in ("problems", "warnings")}
        return cls(**{**value, **found})


def repeats(keys: Keys, where: Callable[[int], str]) -> tuple[int, list[Finding]]:
    """How many rows say the same as an earlier one, and a finding that names some; `where` gives a row's place."""
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    later = np.flatnonzero(first[which] != np.arange(len(keys)))
    pairs = ((where(int(row)), where(int(first[which[row]]))) for row in later)
    again = [f"{place} = {earlier}" for place, earlier in pairs if place != earlier]
    if not again:
        return 0, []
    some = ", ".join([*again[:SHOWN], *(["..."] if again[SHOWN:] else [])])
    found = Finding(again[0].split(" = ")[0], f"{counted(len(again))} the same as an earlier one ({some})")
    return len(again), [found]


def histogram(lengths: npt.NDArray[np.int64]) -> dict[str, int]:
    """Rows by their tokens: `<=64` counts those of 33 to 64 tokens."""
    if not len(lengths):
        return {}
    exponents = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    return {f"<={2 ** int(e)}": int((exponents == e).sum()) for e in range(exponents.min(), exponents.max() + 1)}
