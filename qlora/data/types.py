"""The types of this package: record, message, example, finding, and the reason why a record can't be used."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qlora.errors import DataError

IGNORED = -100  # the label of a token without loss: torch's default for cross entropy

# Roles of messages that are not turns of a conversation. A format returns them, the encoder handles them.
TEXT = "text"  # a plain text, all of it trained
TOKENS = "tokens"  # extra: input_ids and labels of a record that is tokenized already
TOOLS = "tools"  # extra: tools, the JSON schemas passed to the chat template

Ints = npt.NDArray[np.int32]


class RecordError(DataError):
    """A record can't be used. `reason` is short and countable, `detail` describes this record."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Record:
    """One raw entry of a data set. where: file:line, with the path as the user wrote it. copies: in each epoch."""

    where: str
    fields: Mapping[str, Any]
    copies: int = 1


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A line that can't be read as a record."""

    where: str
    reason: str
    detail: str = ""

    @property
    def message(self) -> str:
        """The reason and the detail."""
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True, slots=True)
class Finding:
    """A message to the user about a file:line or a recipe key."""

    where: str
    message: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation. `extra` (tool_calls, name, ...) is passed to the chat template unchanged.

    train: whether the message bears loss; None: data.train_on decides. `train: true` has no effect on a message that is
    not the assistant's. prompt: part of a completion's prompt, which bears loss only if `train` or data.train_on asks.
    """

    role: str
    content: str
    train: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    prompt: bool = False


@dataclass(frozen=True, slots=True)
class Unused:
    """What a record holds and training does not use; the report counts it."""

    fields: tuple[str, ...] = ()  # keys of the record that its format does not read
    keys: tuple[str, ...] = ()  # keys of its messages that neither qlora nor the chat template reads
    thoughts: tuple[str, ...] = ()  # keys of thoughts that the template does not write
    contents: tuple[str, ...] = ()  # roles of messages whose content the template does not write
    trained_roles: tuple[str, ...] = ()  # roles other than the assistant's that ask for loss


class Branch(NamedTuple):
    """A segment of tokens that continues an earlier token of its document instead of the one before it.

    start: index of its first token. parent: index of the token that it follows, or -1: it follows none.
    """

    start: int
    parent: int


class Side(NamedTuple):
    """One answer of a preference pair, or of feedback: the trained tokens from `start` to the next side or document."""

    start: int
    role: int  # CHOSEN or REJECTED


ROLES = ("chosen", "rejected")
CHOSEN, REJECTED = range(2)


class Layout(NamedTuple):
    """What the sequences of a micro-batch consist of, by sequence; all empty: each is one document without padding."""

    starts: tuple[tuple[int, ...], ...] = ()  # where its documents start
    lengths: tuple[int, ...] = ()  # tokens without padding
    branches: tuple[tuple[Branch, ...], ...] = ()  # of its documents; empty if no sequence has any


PLAIN_LAYOUT = Layout()


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """Token ids and labels of one conversation, or of a packed sequence. labels: -100 or the token itself, unshifted.

    A packed sequence holds several documents: `boundaries` are the indices where the second and later ones start,
    `origins` the file:line of each. Position ids restart at every boundary.
    A document may be a prefix tree (prefix_tree.py): `branches`, ascending, and position ids that continue the parent.
    It may consist of `sides` (pairs.py), the first of which starts with it.
    """

    where: str
    input_ids: Ints  # [T]
    labels: Ints  # [T]
    boundaries: tuple[int, ...] = ()
    origins: tuple[str, ...] = ()
    branches: tuple[Branch, ...] = ()
    sides: tuple[Side, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    def document_starts(self) -> tuple[int, ...]:
        """The index of the first token of each document."""
        return (0, *self.boundaries)

    def segments(self) -> list[Branch]:
        """Documents and branches in order: each segment sees itself, its parent, and what the parent sees."""
        return sorted([*(Branch(start, -1) for start in self.document_starts()), *self.branches])

    def trained_tokens(self) -> int:
        """Number of tokens that bear loss. A document's first token is not predicted, so it is not counted."""
        targets = self.labels != IGNORED
        if not self.boundaries and not self.branches:  # the usual case, several times faster
            return int(np.count_nonzero(targets[1:]))
        roots = [segment.start for segment in self.segments() if segment.parent < 0]
        return int(targets.sum()) - int(targets[roots].sum() if len(self) else 0)


def count_of(count: int, noun: str = "record") -> str:
    """`1 record`, `1,234 records`."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def trained_tokens(examples: Iterable[Example]) -> int:
    """Number of tokens of all `examples` that bear loss."""
    return sum(example.trained_tokens() for example in examples)
