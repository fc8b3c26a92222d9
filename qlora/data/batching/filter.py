"""The example filter: each record is kept, split, truncated or dropped, and counted, with findings for the report."""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING

from qlora.data.batching.dataset import ExampleWriter
from qlora.data.batching.fit_length import FittedRecord, fit_length
from qlora.data.conversations.build_example import Encoded
from qlora.data.conversations.encode_records import EncodeResult, RawRecord
from qlora.data.occurrences import Occurrences
from qlora.data.prefix_tree import paths_of
from qlora.data.remedies import with_remedy
from qlora.data.types import IGNORED, BadRecord, Example, Finding, Ints, Record, RecordError
from qlora.data.unused_counter import UnusedCounter

if TYPE_CHECKING:
    from qlora.data import Data


class ExampleFilter:
    """Counts of one data set; kept examples go to `writer`. where: the recipe key, for findings about the whole set.

    A kept record takes 32 bytes here (`keys`, `answer_keys`, `copies`, `pieces`). Its tokens are in the column store.
    """

    def __init__(self, where: str, writer: ExampleWriter) -> None:
        self.where = where
        self.records = self.kept = self.truncated = self.split = self.control_records = 0
        self.tokens = self.trained_tokens = 0
        self.trees = self.tokens_of_trees = self.tokens_of_paths = self.overlong_answers = 0
        self.dropped: Counter[str] = Counter()
        self.problems: list[Finding] = []
        self.warnings: list[Finding] = []
        self.keys = array("Q")  # of each kept record; equal for equal tokens and labels
        self.copies = array("q")
        self.pieces = array("q")  # examples that a kept record was split into; 1 for most
        self.answer_keys = array("Q")  # equal for examples with equal trained tokens
        self.overlong_lengths = array("q")  # tokens of examples above data.max_length
        self.without_end_token = Occurrences()
        self.with_untrained_answers = Occurrences()
        self.untrained_answers = 0
        self.unused = UnusedCounter()
        self._writer = writer

    def drop(self, where: str, reason: str, detail: str, is_problem: bool = False) -> None:
        """Count a record that is not trained on, and why."""
        self.records += 1
        self.dropped[reason] += 1
        finding = Finding(where, f"dropped, {with_remedy(reason, detail)}")
        (self.problems if is_problem else self.warnings).append(finding)

    def keep(self, encoded: Encoded, copies: int, examples: Sequence[Example]) -> None:
        """Count and store the examples of a record, which are trained on `copies` times in an epoch."""
        example = encoded.example
        self.records += 1
        self.kept += 1
        self.trained_tokens += sum(part.trained_tokens() for part in examples)
        if example.branches:
            self._count_tree(example, examples)
        else:
            self.tokens += len(example)
            self.split += examples[0] is not example
        self.keys.append(_key(example.input_ids, example.labels))
        self.answer_keys.append(_key(example.labels[example.labels != IGNORED]))
        self.copies.append(copies)
        self.pieces.append(len(examples))
        for part in examples:
            self._writer.add(part)
        self._add_findings(encoded)

    def _count_tree(self, tree: Example, examples: Sequence[Example]) -> None:
        """Count the tokens that are computed for a record, and those that its answers would take one by one."""
        tokens = sum(map(len, examples))
        self.tokens += tokens
        self.tokens_of_trees += tokens
        self.trees += 1
        self.tokens_of_paths += sum(len(path) for path in paths_of(tree))

    def _add_findings(self, encoded: Encoded) -> None:
        where = encoded.example.where
        self.unused.add(where, encoded.unused)
        if encoded.control_strings:
            self.control_records += 1
            kinds = ", ".join(repr(text) for text in dict.fromkeys(encoded.control_strings))
            self.warnings.append(Finding(where, f"control strings in the text, kept as text: {kinds}"))
        if encoded.unknown_tokens:
            message = (
                f"{encoded.unknown_tokens} trained tokens are unknown to the tokenizer: they are trained as one token"
            )
            self.warnings.append(Finding(where, message))
        if not encoded.end_trained:
            self.without_end_token.add(where)
        if encoded.untrained_answers:
            self.with_untrained_answers.add(where)
            self.untrained_answers += encoded.untrained_answers

    @property
    def end_trained(self) -> float:
        """Fraction of the kept examples that end with a trained end token."""
        return 1 - self.without_end_token.count / self.kept if self.kept else 0.0

    def blocking_problems(self) -> list[Finding]:
        """Why the data set as a whole can't be trained on, if so."""
        if not self.kept:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.most_common())
            problem = f"no records left of {self.records}: {reasons or 'the data set is empty'}"
            return [Finding(self.where, f"{problem}. {self._first_reason()}")]
        if not self.trained_tokens:
            return [Finding(self.where, "no trained tokens in any record. Check data.train_on and the records' labels")]
        return []

    def _first_reason(self) -> str:
        """The first dropped record and why, unless it is a problem of its own: usually the reason for all of them."""
        dropped = next((finding for finding in self.warnings if finding.message.startswith("dropped")), None)
        if dropped:
            return f"First: {dropped.where}: {dropped.message}."
        return "See the problems above." if self.problems else "Name a file with records."


def _key(*arrays: Ints) -> int:
    """A 64-bit digest of the arrays: equal for equal ones."""
    digest = blake2b(b"".join(item.tobytes() for item in arrays), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def filter_example(
    examples: ExampleFilter, record: RawRecord, result: EncodeResult, section: "Data", shares_prefixes: bool = True
) -> None:
    """Keep, split, truncate or drop one record. shares_prefixes: whether prefix trees can be trained."""
    if isinstance(record, BadRecord):
        examples.drop(record.where, record.reason, record.detail, is_problem=True)
    elif isinstance(result, RecordError):
        examples.drop(record.where, result.reason, result.detail)
    elif result is not None:
        try:
            fitted = fit_length(result, section, shares_prefixes)
        except RecordError as error:
            examples.drop(record.where, error.reason, error.detail)
            return
        _filter_by_length(examples, record, result, section, fitted)


def _filter_by_length(
    examples: ExampleFilter, record: Record, encoded: Encoded, section: "Data", fitted: FittedRecord
) -> None:
    if fitted.examples and not fitted.truncated and not fitted.overlong_answers:  # the usual case
        examples.keep(encoded, record.copies, fitted.examples)
        return
    length = f"{len(encoded.example)} tokens, data.max_length is {section.max_length}"
    if fitted.truncated or not fitted.examples:
        examples.overlong_lengths.append(len(encoded.example))
    if fitted.examples and not (fitted.overlong_answers and section.overlong == "error"):
        examples.overlong_answers += fitted.overlong_answers
        examples.truncated += fitted.truncated
        if fitted.truncated:
            examples.warnings.append(Finding(record.where, f"truncated: {length}"))
            is_tree = bool(encoded.example.branches)
            example = encoded.example if is_tree else fitted.examples[0]
            encoded = replace(encoded, example=example, end_trained=is_tree and encoded.end_trained)
        if fitted.overlong_answers:
            message = f"answers above data.max_length left out: {fitted.overlong_answers}"
            examples.warnings.append(Finding(record.where, message))
        examples.keep(encoded, record.copies, fitted.examples)
    elif section.overlong == "truncate":
        examples.drop(record.where, "nothing left to train", f"{length}, and all trained tokens come after it")
    else:
        only = "; only plain text is split" if section.overlong == "split" else ""
        examples.drop(record.where, "overlong", length + only, is_problem=section.overlong == "error")
