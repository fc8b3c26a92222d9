"""The last step from a rendered conversation to an example: ids and labels put together, the loss mask verified."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qlora.data.conversations.safe_tokenizer import SafeTokenizer, TextPiece, without_whitespace
from qlora.data.types import IGNORED, Example, Ints, Message, RecordError, Unused

NO_IDS: Ints = np.zeros(0, dtype=np.int32)
NOTHING = Unused()


@dataclass(frozen=True, slots=True)
class Draft:
    """A record after rendering and masking, before tokenization."""

    pieces: tuple[TextPiece, ...] = ()
    break_char: str = ""  # breaks control strings of the record's text; never tokenized
    control_strings: tuple[str, ...] = ()  # in the record's text
    untrained_answers: int = 0  # answers without loss, because the template rewrites them in later turns
    end_trained: bool = True  # the last trained piece ends with an end token
    prefix_ids: Ints = field(default_factory=lambda: NO_IDS)  # before the pieces, not trained
    suffix_ids: Ints = field(default_factory=lambda: NO_IDS)  # after the pieces, trained
    unused: Unused = NOTHING


@dataclass(frozen=True, slots=True)
class Encoded:
    """A record after tokenization: its example, and what the report counts."""

    example: Example
    control_strings: tuple[str, ...] = ()
    untrained_answers: int = 0
    end_trained: bool = True
    unknown_tokens: int = 0  # trained tokens that stand for text without a token of its own
    unused: Unused = NOTHING
    kind: str = ""  # TEXT or TOKENS; empty for a conversation


def build_example(where: str, draft: Draft, ids: Sequence[Ints], train_all: bool) -> Example:
    """The example of a draft. ids: of each piece."""
    trained = [train_all, *(piece.trained or (train_all and not piece.masked) for piece in draft.pieces), True]
    spans = [draft.prefix_ids, *ids, draft.suffix_ids]
    labels = [span if t else np.full(len(span), IGNORED, np.int32) for span, t in zip(spans, trained, strict=True)]
    return Example(where, np.concatenate(spans), np.concatenate(labels))


def from_token_record(where: str, message: Message, vocab_size: int) -> Example:
    """The example of a record that is tokenized already. RecordError for an id outside the vocabulary."""
    ids, labels = message.extra["input_ids"], message.extra["labels"]
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise RecordError("unknown token", f"ids from {ids.min()} to {ids.max()}, the vocabulary has {vocab_size}")
    if not (labels[1:] != IGNORED).any():
        raise RecordError("nothing to train", "every label is -100, or only the first is not")
    return Example(where, ids, labels)


def verify_masks(
    drafts: Sequence[Draft], ids: Sequence[Sequence[Ints]], tokenizer: SafeTokenizer
) -> list[int | RecordError]:
    """Verify for each draft that its trained ids decode to its trained text; returns the number of unknown tokens.

    RecordError if they do not: a loss mask that can't be verified is not trained on.
    """
    trained = [
        (index, piece.text.replace(draft.break_char, "") if draft.break_char else piece.text, piece_ids)
        for index, (draft, draft_ids) in enumerate(zip(drafts, ids, strict=True))
        for piece, piece_ids in zip(draft.pieces, draft_ids, strict=True)
        if piece.trained
    ]
    results: list[int | RecordError] = [0] * len(drafts)
    decoded = tokenizer.decode([piece_ids for _, _, piece_ids in trained])
    for (index, text, piece_ids), decoded_text in zip(trained, decoded, strict=True):
        unknown = int((piece_ids == tokenizer.unknown_id).sum())
        so_far = results[index]
        if isinstance(so_far, RecordError):
            continue
        actual = without_whitespace(decoded_text)
        same = actual == without_whitespace(text) or actual == without_whitespace(tokenizer.normalize(text))
        results[index] = so_far + unknown if same or unknown else _not_verified(text, decoded_text)
    return results


def _not_verified(text: str, decoded: str) -> RecordError:
    return RecordError("mask not proved", f"{text[:60]!r} reads {decoded[:60]!r} after tokenization")
