"""The nouns of this room: a row, a message, an example, a finding, and the reason why a row can't be used."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora.errors import DataError

IGNORED = -100  # the label that bears no loss; torch's own convention for cross entropy

# Messages that are no chat turns. A format gives them, the encoder knows what they mean.
TEXT = "text"  # one document, trained whole
TOKENS = "tokens"  # extra: input_ids and labels, as they came
TOOLS = "tools"  # extra: tools, the JSON schemas handed to the chat template

Ints = npt.NDArray[np.int32]


class RecordError(DataError):
    """One row can't be used. `reason` is short and countable; `detail` says what was found in this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a data set. `where` is file:line as the user wrote the file; `copies` is its share of an epoch."""

    where: str
    fields: Mapping[str, Any]
    copies: int = 1


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A line that could not be read as a record."""

    where: str
    reason: str
    detail: str = ""

    @property
    def message(self) -> str:
        """The reason with what was found."""
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to tell the user, and the file:line or key it is about."""

    where: str
    message: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `train` None leaves it to data.train_on; `extra` (tool_calls, name, ...) reaches the template as is.

    `train: true` has no effect on a turn that is not the assistant's: only its words are ever asked of the model.
    """

    role: str
    content: str
    train: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One row of tokens. labels: -100 or the token itself, before the shift.

    A packed row holds several documents: `boundaries` are the indices where the second and later ones begin, `parts`
    the place each document came from. Positions restart at every boundary.
    """

    where: str
    input_ids: Ints  # [T]
    labels: Ints  # [T]
    boundaries: tuple[int, ...] = ()
    parts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    def starts(self) -> tuple[int, ...]:
        """The index at which each document of this row begins."""
        return (0, *self.boundaries)

    def trained_tokens(self) -> int:
        """How many tokens bear loss: a document's first token has nothing before it to be predicted from."""
        targets = self.labels != IGNORED
        return int(targets.sum()) - int(targets[list(self.starts())].sum() if len(self) else 0)


def counted(rows: int) -> str:
    """`1 row`, `1,234 rows`."""
    return f"{rows:,} row" + "s" * (rows != 1)


def trained_tokens(examples: Iterable[Example]) -> int:
    """Loss terms of all `examples` together."""
    return sum(example.trained_tokens() for example in examples)


SHOWN = 5  # places named in a finding about many rows


class Occurrences:
    """How many rows something was seen in, and the first few of them."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[str] = []

    def add(self, where: str) -> None:
        """One more row."""
        self.count += 1
        if len(self._first) <= SHOWN:
            self._first.append(where)

    def told(self, text: str) -> str:
        """`text` with the count before it and the first places behind it."""
        more = ", ..." if self.count > SHOWN else ""
        return f"{counted(self.count)} {text} ({', '.join(self._first[:SHOWN])}{more})"
