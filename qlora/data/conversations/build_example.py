"""A row between text and tokens: its pieces, what frames them, and how its ids and labels come out of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qlora.data.conversations.safe_tokenizer import SafeTokenizer, TextPiece
from qlora.data.types import IGNORED, Example, Ints, Message, RecordError

NO_IDS: Ints = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Draft:
    """What is known of a row before it is tokenised. `head` and `tail` are ids put around the pieces' own."""

    pieces: tuple[TextPiece, ...] = ()
    mark: str = ""  # breaks forged control strings; never tokenised
    forged: tuple[str, ...] = ()  # control strings in the data's text
    skipped: int = 0  # answers left out because their prefix could not be proved
    ends: bool = True  # the last trained stretch closes with an end token
    head: Ints = field(default_factory=lambda: NO_IDS)  # not trained
    tail: Ints = field(default_factory=lambda: NO_IDS)  # trained


@dataclass(frozen=True, slots=True)
class Encoded:
    """An example and what was noticed on the way to it."""

    example: Example
    forged: tuple[str, ...] = ()
    skipped: int = 0
    ends: bool = True
    unknown: int = 0  # characters the tokenizer has no token for


def assemble(where: str, draft: Draft, ids: Sequence[Ints], train_all: bool) -> Example:
    """The example of a draft whose pieces became `ids`."""
    trained = [train_all, *(train_all or piece.trained for piece in draft.pieces), True]
    parts = [draft.head, *ids, draft.tail]
    labels = [part if t else np.full(len(part), IGNORED, np.int32) for part, t in zip(parts, trained, strict=True)]
    return Example(where, np.concatenate(parts), np.concatenate(labels))


def given(where: str, message: Message, vocabulary: int) -> Example:
    """The example of a row that came as tokens. RowError for an id the model has no embedding for."""
    ids, labels = message.extra["input_ids"], message.extra["labels"]
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise RecordError("unknown token", f"ids from {ids.min()} to {ids.max()}, the vocabulary has {vocabulary}")
    if not (labels[1:] != IGNORED).any():
        raise RecordError("nothing to train", "every label is -100, or only the first is not")
    return Example(where, ids, labels)


def prove(drafts: Sequence[Draft], ids: Sequence[Sequence[Ints]], tokeniser: SafeTokenizer) -> list[int | RecordError]:
    """For each draft, that its trained ids decode to the text that should be trained: the number of unknown characters.

    RowError where they don't: a mask that can't be proved is not trained on.
    """
    claims = [
        (row, piece.text.replace(draft.mark, "") if draft.mark else piece.text, part)
        for row, (draft, parts) in enumerate(zip(drafts, ids, strict=True))
        for piece, part in zip(draft.pieces, parts, strict=True)
        if piece.trained
    ]
    found: list[int | RecordError] = [0] * len(drafts)
    texts = tokeniser.decode([part for _, _, part in claims])
    for (row, said, part), text in zip(claims, texts, strict=True):
        unknown = int((part == tokeniser.unknown_id).sum())
        so_far = found[row]
        if isinstance(so_far, RecordError):
            continue
        same = _squashed(text) == _squashed(said) or _squashed(text) == _squashed(tokeniser.normalised(said))
        found[row] = so_far + unknown if same or unknown else _unproved(said, text)
    return found


def _unproved(said: str, text: str) -> RecordError:
    return RecordError("mask not proved", f"{said[:60]!r} reads {text[:60]!r} after tokenising")


def _squashed(text: str) -> str:
    return "".join(text.split())
