"""The data report: records read, kept and dropped, trained tokens, and what to know before training."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora.data.answer_counter import summary_of
from qlora.data.occurrences import MAX_LISTED
from qlora.data.types import Finding, count_of
from qlora.errors import DataError

Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class DataReport:
    """Counts and findings of prepared data. `problems` stop a run, `warnings` and `notes` do not.

    Counts are of the records of data.train, held-out ones included, each counted once whatever its weight. Every
    dropped record of data.train and data.eval is named in `problems` (lines that can't be read) or in `warnings`.
    """

    rows: int  # records read
    kept: int
    dropped: dict[str, int]
    tokens: int
    trained_tokens: int
    problems: list[Finding]
    warnings: list[Finding]
    sha256: str
    notes: list[str]  # the chat template, keys that are not read, and whether the data was read from the cache
    eval_rows: int = 0  # examples of data.eval, or held out of data.train
    truncated: int = 0
    split: int = 0  # records of plain text above max_length, each trained in several pieces
    pieces: int = 0  # examples that those records were split into
    answers: int = 0  # of conversations, that are to be trained
    trained_answers: int = 0
    thoughts: int = 0  # of those answers
    trained_thoughts: int = 0
    trees: int = 0  # conversations whose answers have contexts of their own, since the template rewrites the past
    tokens_of_trees: int = 0  # of those conversations
    tokens_of_paths: int = 0  # that the answers of those conversations would take one by one
    end_trained: float = 1.0  # fraction of the kept records whose last trained token is an end token
    control_rows: int = 0  # records with control strings in their text
    duplicates: int = 0  # records with the same tokens and labels as an earlier one
    overlap: int = 0  # held-out examples that are in the training set too
    lengths: dict[str, int] = field(default_factory=dict)  # records by number of tokens, in powers of two
    packed_rows: int = 0  # sequences of the training set

    def raise_for_problems(self) -> None:
        """DataError with the problems, if there are any."""
        if self.problems:
            shown = [f"{finding.where}: {finding.message}" for finding in self.problems[:MAX_LISTED]]
            more = len(self.problems) - len(shown)
            tail = [f"and {more} more; `qlora check --json` names each"] if more else []
            tail += ["Nothing was trained. Fix or remove these records and run again."]
            raise DataError("\n".join([*shown, *tail]))

    def counts(self) -> dict[str, Any]:
        """The report without the findings, for run.json."""
        return {name: value for name, value in asdict(self).items() if name not in ("problems", "warnings", "notes")}

    def summary(self) -> list[str]:
        """The counts as text, in a few lines."""
        fraction = self.trained_tokens / self.tokens if self.tokens else 0.0
        lines = [
            f"{self.kept:,} of {self.rows:,} records kept, {self.trained_tokens:,} of {self.tokens:,} tokens trained "
            f"({fraction:.1%}), the end token trained in {self.end_trained:.1%} of the records",
            "tokens per record: " + ", ".join(f"{size} {count:,}" for size, count in self.lengths.items()),
            f"{count_of(self.packed_rows, 'sequence')} to train on, {self.eval_rows:,} held out",
        ]
        lines[1:1] = summary_of(self.answers, self.trained_answers, self.thoughts, self.trained_thoughts)
        if self.tokens_of_trees < self.tokens_of_paths:
            lines.insert(
                2,
                f"{count_of(self.trees, 'conversation')} with a context for each answer: {self.tokens_of_trees:,} "
                f"tokens, since answers share prefixes; {self.tokens_of_paths:,} one by one",
            )
        if self.split:
            lines.insert(1, f"{count_of(self.split)} of text above max_length split into {self.pieces:,} pieces")
        return lines if self.kept else lines[:1]

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "DataReport":
        """The report that `as_json` returned. TypeError or KeyError for anything else."""
        findings = {name: [Finding(**item) for item in value[name]] for name in ("problems", "warnings")}
        return cls(**{**value, **findings})


def find_duplicates(keys: Keys, where: Callable[[int], str]) -> tuple[int, list[Finding]]:
    """The number of records whose key equals an earlier one's, and a finding that lists some. where: index -> location.

    A record of a file that is listed twice is not a duplicate of itself.
    """
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    later = np.flatnonzero(first[group] != np.arange(len(keys)))
    pairs = ((where(int(index)), where(int(first[group[index]]))) for index in later)
    duplicates = [f"{location} = {earlier}" for location, earlier in pairs if location != earlier]
    if not duplicates:
        return 0, []
    listed = ", ".join([*duplicates[:MAX_LISTED], *(["..."] if duplicates[MAX_LISTED:] else [])])
    message = f"{count_of(len(duplicates))} the same as an earlier one ({listed})"
    return len(duplicates), [Finding(duplicates[0].split(" = ")[0], message)]


def length_histogram(lengths: npt.NDArray[np.int64]) -> dict[str, int]:
    """Records by number of tokens: `<=64` counts those of 33 to 64 tokens."""
    if not len(lengths):
        return {}
    exponents = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    return {f"<={2 ** int(e)}": int((exponents == e).sum()) for e in range(exponents.min(), exponents.max() + 1)}
