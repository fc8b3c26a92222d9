"""The last step from a rendered conversation to an example: ids and labels put together, the loss mask verified."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qlora.data.conversations.chat_messages import Conversation
from qlora.data.conversations.path_tokens import NO_IDS, TokenPaths
from qlora.data.conversations.safe_tokenizer import SafeTokenizer, without_whitespace
from qlora.data.conversations.text_paths import TextPath
from qlora.data.prefix_tree import merge_paths
from qlora.data.types import IGNORED, Branch, Example, Ints, Message, RecordError, Side, Unused

NOTHING = Unused()


@dataclass(frozen=True, slots=True)
class AnswerCounts:
    """The answers of a record that are to be trained, and their thoughts; and how many of both are trained."""

    total: int = 0
    trained: int = 0
    thoughts: int = 0
    trained_thoughts: int = 0
    merges: tuple[str, ...] = ()  # rules by which messages were changed, since the template refuses them (roles.py)


NO_ANSWERS = AnswerCounts()


@dataclass(frozen=True, slots=True)
class Draft:
    """A record after rendering and masking, before tokenization."""

    paths: tuple[TextPath, ...] = ()
    break_char: str = ""  # breaks control strings of the record's text; never tokenized
    control_strings: tuple[str, ...] = ()  # in the record's text
    end_trained: bool = True  # the last trained answer ends with an end token
    prefix_ids: Ints = field(default_factory=lambda: NO_IDS)  # before each path; trained with every other token only
    eos: Ints = field(default_factory=lambda: NO_IDS)  # after an answer that no control token closes
    unused: Unused = NOTHING
    answers: AnswerCounts = NO_ANSWERS
    conversation: Conversation | None = None  # of a prompt, as the template read it


@dataclass(frozen=True, slots=True)
class Encoded:
    """A record after tokenization: its example, and what the report counts."""

    example: Example
    control_strings: tuple[str, ...] = ()
    end_trained: bool = True
    unknown_tokens: int = 0  # trained tokens that stand for text without a token of its own
    unused: Unused = NOTHING
    kind: str = ""  # TEXT or TOKENS; empty for a conversation
    answers: AnswerCounts = NO_ANSWERS

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as plain values, several times faster than field by field: workers send one for each record."""
        example, unused, answers = self.example, self.unused, self.answers
        arrays = (example.input_ids.tobytes(), example.labels.tobytes())
        rest = (
            example.boundaries,
            example.origins,
            tuple(map(tuple, example.branches)),
            tuple(map(tuple, example.sides)),
        )
        counts = (self.control_strings, self.end_trained, self.unknown_tokens)
        values = (
            None if unused == NOTHING else unused,
            self.kind,
            answers.total,
            answers.trained,
            answers.thoughts,
            answers.trained_thoughts,
            answers.merges,
        )
        return _unpickled, (example.where, *arrays, *rest, *counts, *values)

    @property
    def untrained_answers(self) -> int:
        """Answers that are to be trained, and are not."""
        return self.answers.total - self.answers.trained


def _unpickled(where: str, ids: bytes, labels: bytes, *values: Any) -> Encoded:
    """What `Encoded.__reduce__` takes apart."""
    boundaries, origins, branches, sides, control_strings, end_trained, unknown_tokens, unused, kind, *counts = values
    arrays = [np.frombuffer(array, np.int32).copy() for array in (ids, labels)]
    parts = (tuple(Branch(*pair) for pair in branches), tuple(Side(*pair) for pair in sides))
    example = Example(where, arrays[0], arrays[1], boundaries, origins, parts[0], parts[1])
    answers = AnswerCounts(*counts)
    return Encoded(example, control_strings, end_trained, unknown_tokens, unused or NOTHING, kind, answers)


def build_example(where: str, draft: Draft, tokens: TokenPaths, train_all: bool) -> Example:
    """The example of a draft: its paths merged by their common beginnings. train_all: every token bears loss."""
    prefix = draft.prefix_ids
    if not len(prefix):
        return merge_paths(where, tokens.paths)
    untrained = np.full(len(prefix), IGNORED, np.int32)
    return merge_paths(
        where,
        [
            (np.concatenate([prefix, ids]), np.concatenate([untrained if number or not train_all else prefix, labels]))
            for number, (ids, labels) in enumerate(tokens.paths)
        ],
    )


def from_token_record(where: str, message: Message, vocab_size: int) -> Example:
    """The example of a record that is tokenized already. RecordError for an id outside the vocabulary."""
    ids, labels = message.extra["input_ids"], message.extra["labels"]
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise RecordError("unknown token", f"ids from {ids.min()} to {ids.max()}, the vocabulary has {vocab_size}")
    if not (labels[1:] != IGNORED).any():
        raise RecordError("nothing to train", "every label is -100, or only the first is not")
    return Example(where, ids, labels)


def verify_masks(records: Sequence[TokenPaths], tokenizer: SafeTokenizer) -> list[int | RecordError]:
    """Verify for each record that its trained ids decode to its trained text; returns the number of unknown tokens.

    RecordError if they do not: a loss mask that can't be verified is not trained on.
    """
    trained = [(index, item) for index, record in enumerate(records) for item in record.trained]
    results: list[int | RecordError] = [0] * len(records)
    decoded = tokenizer.decode([item.ids for _, item in trained])
    for (index, (text, ids)), decoded_text in zip(trained, decoded, strict=True):
        so_far = results[index]
        if isinstance(so_far, RecordError):
            continue
        unknown = 0 if tokenizer.unknown_id is None else np.count_nonzero(ids == tokenizer.unknown_id)
        if unknown or _is_same(text, decoded_text, tokenizer):
            results[index] = so_far + int(unknown)
        else:
            results[index] = _not_verified(text, decoded_text)
    return results


def _is_same(text: str, decoded: str, tokenizer: SafeTokenizer) -> bool:
    """Whether decoded ids read as their text, whitespace and the tokenizer's normalization aside."""
    if decoded == text:
        return True
    actual = without_whitespace(decoded)
    return actual == without_whitespace(text) or actual == without_whitespace(tokenizer.normalize(text))


def _not_verified(text: str, decoded: str) -> RecordError:
    return RecordError("mask not proved", f"{text[:60]!r} reads {decoded[:60]!r} after tokenization")
