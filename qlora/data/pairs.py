"""Preference pairs and feedback as examples: each answer is a side, whose log-probabilities are summed apart.

A pair is a prefix tree: the prompt is its trunk, the chosen answer goes on, the rejected one is a branch. A token
belongs to one side only, so that tokens with which both answers begin are there twice. Where a model does not train
trees, a pair is two documents.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qlora.data.batching.join import join_documents
from qlora.data.batching.packing import split_documents
from qlora.data.prefix_tree import path_indices
from qlora.data.types import CHOSEN, IGNORED, REJECTED, Branch, Example, Ints, RecordError, Side


def pair_of(where: str, chosen: Example, rejected: Example) -> Example:
    """The tree of a pair from the examples of its two conversations. RecordError if these have different prompts."""
    fork = _fork(chosen, rejected)
    shift = len(chosen) - fork
    rest = (
        Branch(start + shift, parent + shift * (parent >= fork))
        for start, parent in (Branch(fork, fork - 1), *rejected.branches)
    )
    return Example(
        where,
        np.concatenate([chosen.input_ids, rejected.input_ids[fork:]]),
        np.concatenate([chosen.labels, rejected.labels[fork:]]),
        branches=(*chosen.branches, *rest),
        sides=(Side(0, CHOSEN), Side(len(chosen), REJECTED)),
    )


def _fork(chosen: Example, rejected: Example) -> int:
    """The number of tokens before the first one that either answer trains."""
    first = min(_first_trained(chosen.labels), _first_trained(rejected.labels))
    if not np.array_equal(chosen.input_ids[:first], rejected.input_ids[:first]):
        raise RecordError("different prompts", "the tokens before the answers are not the same")
    if np.array_equal(chosen.input_ids, rejected.input_ids):
        raise RecordError("identical sides", "both answers have the same tokens")
    return first


def _first_trained(labels: Ints) -> int:
    return int((labels != IGNORED).argmax())


def feedback_of(example: Example, role: int) -> Example:
    """The example of one answer that is wanted (CHOSEN) or unwanted (REJECTED)."""
    return replace(example, sides=(Side(0, role),))


def sides_of(example: Example) -> list[Example]:
    """The conversations of an example's sides, in order, each without sides; of a packed sequence, of all documents."""
    if len(example.document_starts()) > 1:
        return [side for document in split_documents(example) for side in sides_of(document)]
    ends = [*(side.start for side in example.sides[1:]), len(example)]
    return [_side(example, side.start, end) for side, end in zip(example.sides, ends, strict=True)]


def _side(example: Example, start: int, end: int) -> Example:
    """The side start..end with all that it sees. Its own branches keep their order."""
    if not start and end == len(example):
        return replace(example, sides=())
    trunk = next(path for path in path_indices(example) if path[-1] >= start and path[-1] < end)
    shared = trunk[trunk < start]
    own = np.concatenate([shared, np.arange(start, end, dtype=np.int32)])
    labels = example.labels[own]
    labels[: len(shared)] = IGNORED
    branches = tuple(
        Branch(branch.start - start + len(shared), _moved(branch.parent, start, len(shared)))
        for branch in example.branches
        if start < branch.start < end
    )
    return Example(example.where, example.input_ids[own], labels, branches=branches)


def _moved(parent: int, start: int, shared: int) -> int:
    return parent - start + shared if parent >= start else parent


def apart(example: Example) -> Example:
    """A pair as two documents of one sequence; feedback unchanged. RecordError if a side is a tree of its own."""
    conversations = sides_of(example)
    if any(conversation.branches for conversation in conversations):
        raise RecordError("no single rendering", "the chat template rewrites earlier answers of a side")
    if len(conversations) < 2:
        return example
    joined = join_documents(conversations)
    starts = joined.document_starts()
    sides = tuple(Side(start, side.role) for start, side in zip(starts, example.sides, strict=True))
    return replace(joined, where=example.where, sides=sides)


def with_trained_prompts(example: Example) -> Example:
    """The example whose chosen conversations are labeled whole, for an objective that learns their prompts too."""
    labels, starts = example.labels.copy(), [*(side.start for side in example.sides), len(example)]
    for side, end in zip(example.sides, starts[1:], strict=True):
        if side.role == CHOSEN:
            labels[side.start : end] = example.input_ids[side.start : end]
    return replace(example, labels=labels)


def chosen_answers(examples: Sequence[Example]) -> Sequence[Example]:
    """The chosen sides of examples, which supervised training would learn; examples without sides unchanged."""
    if not len(examples) or not examples[0].sides:
        return examples
    sides = (zip(sides_of(example), example.sides, strict=True) for example in examples)
    return [conversation for pair in sides for conversation, side in pair if side.role == CHOSEN]
