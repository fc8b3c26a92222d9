"""Token ids of text paths, as an engine makes them: contexts in one piece, and what follows them.

The context of an answer must have the ids that the tokenizer gives for the whole text before it, and the answer those
that follow in the tokenization of both. A control token divides the text that the tokenizer sees, so that the ids up
to one do not depend on what comes after it: only the text from the last control token to the answer is tokenized
again, and compared. Where the tokenizer joins the answer with the end of its prompt, the answer is tokenized apart, in
a path of its own, and later contexts come from the joint tokenization.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from qlora.data.conversations.safe_tokenizer import SafeTokenizer
from qlora.data.conversations.text_paths import Stretch, TextPath
from qlora.data.types import IGNORED, Ints, RecordError

NO_IDS: Ints = np.zeros(0, dtype=np.int32)
_MOST_CHARS = 2**24  # tokenized again to prove the contexts of one record


class Trained(NamedTuple):
    """The text and the ids of a trained stretch, to be compared."""

    text: str
    ids: Ints


@dataclass(frozen=True, slots=True)
class TokenPaths:
    """The ids and labels of a record's paths."""

    paths: list[tuple[Ints, Ints]] = field(default_factory=list)
    trained: list[Trained] = field(default_factory=list)


@dataclass(slots=True)
class _Budget:
    """Characters that may still be tokenized again for one record."""

    chars: int = field(default_factory=lambda: _MOST_CHARS)

    def spend(self, chars: int) -> None:
        """RecordError if there are not so many left."""
        self.chars -= chars
        if self.chars < 0:
            detail = f"more than {_MOST_CHARS:,} characters to prove its contexts: no control token ends an answer"
            raise RecordError("takes too long to tokenize", detail)


@dataclass(frozen=True, slots=True)
class PathJob:
    """What is tokenized for a path: its text, or what follows the control strings that the path before it has."""

    path: TextPath
    spans: list[tuple[int, int]]  # of the control strings in the text
    shared: int  # control strings that are taken from the path before it

    @property
    def text(self) -> str:
        """The text to tokenize; it begins with the last shared control string."""
        return self.path.text[self.spans[self.shared - 1][0] :] if self.shared else self.path.text


def path_jobs(paths: Sequence[TextPath], tokenizer: SafeTokenizer) -> list[PathJob]:
    """The job of each path."""
    jobs = list[PathJob]()
    for path in paths:
        spans = [match.span() for match in tokenizer.control_pattern.finditer(path.text)]
        shared = bisect_right([end for _, end in spans], path.shared) if jobs else 0
        jobs.append(PathJob(path, spans, shared))
    return jobs


class _PathIds:
    """The ids of one path's whole text, and those of its beginnings."""

    def __init__(self, job: PathJob, ids: Ints, tokenizer: SafeTokenizer, break_char: str, budget: _Budget) -> None:
        self.text, self.ids = job.path.text, ids
        self._tokenizer, self._break_char, self._budget = tokenizer, break_char, budget
        positions = tokenizer.control_positions(ids)
        if len(positions) > len(job.spans):
            detail = f"the tokenizer makes {len(positions) - len(job.spans)} from ordinary text"
            raise RecordError("forged control token", detail)
        same = len(positions) == len(job.spans)
        self.positions = positions if same else []
        self._spans = job.spans if same else []
        self._ends = [end for _, end in self._spans]

    def up_to(self, at: int) -> tuple[int, Ints]:
        """The ids of the text before `at`: how many of the whole text's, and the ids after them."""
        if at == len(self.text):
            return len(self.ids), NO_IDS
        count = bisect_right(self._ends, at)
        if not count:
            self._budget.spend(at)
            return 0, self._tokenizer.encode_text(self.text[:at], self._break_char)
        index = self.positions[count - 1] + 1
        if self._ends[count - 1] == at:
            return index, NO_IDS
        tail = self.text[self._spans[count - 1][0] : at]
        self._budget.spend(len(tail))
        return index, self._tokenizer.encode_text(tail, self._break_char)[1:]

    def encode_apart(self, start: int, end: int) -> Ints:
        """The ids of the text from `start` to `end`, tokenized apart from the text before it."""
        return self._tokenizer.encode_after(self.text[:start], self.text[start:end], self._break_char)

    def plain_text(self, stretch: Stretch) -> str:
        """The text of a stretch, without the characters that break control strings."""
        text = self.text[stretch.start : stretch.end]
        return text.replace(self._break_char, "") if self._break_char else text

    def index_of(self, count: int, tail: Ints) -> int | None:
        """The number of the whole text's ids that a beginning has; None if it has others. count, tail: of up_to."""
        end = count + len(tail)
        return end if not len(tail) or _are_equal(self.ids[count:end], tail) else None


def token_paths(
    jobs: Sequence[PathJob], ids: Sequence[Ints], tokenizer: SafeTokenizer, break_char: str, eos: Ints, train_all: bool
) -> TokenPaths:
    """The ids and labels of the paths. ids: of each job's text. eos: follows an answer that no control token closes.

    train_all: every token of the first path bears loss, but for masked answers.

    RecordError if the tokenizer makes control tokens of a record's text, or if proving the contexts takes too long.
    """
    result, budget, before = TokenPaths(), _Budget(), None
    for number, (job, job_ids) in enumerate(zip(jobs, ids, strict=True)):
        whole = _joined(before, job, job_ids, tokenizer, break_char)
        before = _PathIds(job, whole, tokenizer, break_char, budget)
        _add(result, before, job.path, eos if job.path.unclosed else NO_IDS, train_all and number == 0)
    return result


def _are_equal(first: Ints, second: Ints) -> bool:
    """`np.array_equal` for short arrays of the same type, several times faster."""
    return first.tobytes() == second.tobytes()


def _joined(before: _PathIds | None, job: PathJob, ids: Ints, tokenizer: SafeTokenizer, break_char: str) -> Ints:
    """The ids of a path's whole text."""
    if not job.shared or before is None:
        return ids
    if job.shared > len(before.positions):  # the control strings of the path before it are not all control tokens
        return tokenizer.encode_text(job.path.text, break_char)
    last = before.positions[job.shared - 1]
    if not _are_equal(before.ids[last : last + 1], ids[:1]):
        return tokenizer.encode_text(job.path.text, break_char)
    return np.concatenate([before.ids[:last], ids])


def _add(result: TokenPaths, ids: _PathIds, path: TextPath, eos: Ints, train_all: bool) -> None:
    """Add a path, and one of its own for each answer that the tokenizer joins with the text around it."""
    labels = ids.ids.copy() if train_all else np.full(len(ids.ids), IGNORED, np.int32)
    apart = list[tuple[Ints, Ints]]()
    for stretch in (s for s in path.stretches if s.trained or (train_all and s.masked)):
        beginnings = [ids.up_to(at) for at in dict.fromkeys((stretch.context, stretch.start, stretch.end))]
        ends = [ids.index_of(*beginning) for beginning in beginnings]
        first, last = ends[-2], ends[-1]
        if None in ends or first is None or last is None or first > last:
            if stretch.masked:
                result.paths.append(_tokenized_in_parts(ids, path.stretches))
                return
            if train_all:
                continue
            after = eos if stretch is path.stretches[-1] else NO_IDS
            apart.append(_answer_apart(ids, stretch, beginnings, after))
            result.trained.append(Trained(ids.plain_text(stretch), _without(apart[-1], after)))
        elif stretch.masked:
            labels[first:last] = IGNORED
        else:
            labels[first:last] = ids.ids[first:last]
            result.trained.append(Trained(ids.plain_text(stretch), ids.ids[first:last]))
    if not apart or (labels != IGNORED).any():
        result.paths.append(
            (np.concatenate([ids.ids, eos]), np.concatenate([labels, eos])) if len(eos) else (ids.ids, labels)
        )
    result.paths.extend(apart)


def _answer_apart(
    ids: _PathIds, stretch: Stretch, beginnings: Sequence[tuple[int, Ints]], eos: Ints
) -> tuple[Ints, Ints]:
    """The path of an answer: the ids that an engine has for its context, and those that it would produce then."""
    context, *_, whole = (np.concatenate([ids.ids[:count], tail]) for count, tail in beginnings)
    before = NO_IDS
    if len(beginnings) == 2 and _are_equal(whole[: len(context)], context):
        own = whole[len(context) :]
    else:
        before = ids.encode_apart(stretch.context, stretch.start) if stretch.context < stretch.start else NO_IDS
        own = ids.encode_apart(stretch.start, stretch.end)
    untrained = np.full(len(context) + len(before), IGNORED, np.int32)
    return np.concatenate([context, before, own, eos]), np.concatenate([untrained, own, eos])


def _without(path: tuple[Ints, Ints], eos: Ints) -> Ints:
    """The trained ids of a path without its last ones."""
    trained: Ints = path[1][path[1] != IGNORED]
    return trained[: len(trained) - len(eos)]


def _tokenized_in_parts(path: _PathIds, stretches: Sequence[Stretch]) -> tuple[Ints, Ints]:
    """Ids and labels where every token but those of masked answers bears loss, and each of these is tokenized apart."""
    bounds = [0, *(at for stretch in stretches if stretch.masked for at in (stretch.start, stretch.end))]
    spans = [path.encode_apart(*span) for span in pairwise([*bounds, len(path.text)])]
    labels = [np.full(len(ids), IGNORED, np.int32) if index % 2 else ids for index, ids in enumerate(spans)]
    return np.concatenate(spans), np.concatenate(labels)
