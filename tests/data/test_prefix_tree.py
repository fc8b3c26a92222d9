"""Prefix trees: every path keeps its tokens and its loss, and common beginnings are stored once."""

from collections import Counter
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.trees import tree_of

from qlora.data import Data
from qlora.data.batching.collate import collate
from qlora.data.batching.column_store import Columns
from qlora.data.batching.dataset import EXAMPLE_COLUMNS, ExampleStore, ExampleWriter
from qlora.data.batching.fit_length import fit_length
from qlora.data.batching.join import join_documents
from qlora.data.batching.packing import split_documents
from qlora.data.conversations.build_example import Encoded
from qlora.data.prefix_tree import PrefixTree, merge_paths, path_indices, paths_of, split_tree
from qlora.data.types import IGNORED, Example

IDS = st.lists(st.integers(1, 3), min_size=1, max_size=8)  # few ids, so that paths share beginnings


def losses(examples: list[Example]) -> Counter[tuple[int, ...]]:
    """Every trained token with the tokens before it."""
    contexts: Counter[tuple[int, ...]] = Counter()
    for example in examples:
        ids = example.input_ids.tolist()
        contexts.update(tuple(ids[: i + 1]) for i in np.flatnonzero(example.labels != IGNORED) if i)
    return contexts


@st.composite
def drawn_paths(draw: Any) -> list[Example]:
    """Paths of distinct trained contexts, as those of one conversation."""
    seen: set[tuple[int, ...]] = set()
    paths = []
    for ids in draw(st.lists(IDS, min_size=1, max_size=6)):
        labels = []
        for i, token in enumerate(ids):
            new = tuple(ids[: i + 1]) not in seen and draw(st.booleans())
            seen |= {tuple(ids[: i + 1])} if new else set()
            labels.append(token if new else IGNORED)
        paths.append(Example("x:1", np.array(ids, np.int32), np.array(labels, np.int32)))
    return paths


def merged(paths: list[Example]) -> Example:
    return merge_paths("x:1", [(path.input_ids, path.labels) for path in paths])


@given(drawn_paths())
def test_a_tree_trains_what_its_paths_train(paths: list[Example]) -> None:
    tree = merged(paths)
    assert losses(paths_of(tree)) == losses(paths)
    assert tree.trained_tokens() == sum(losses(paths).values())
    prefixes = {tuple(path.input_ids[: i + 1].tolist()) for path in paths for i in range(len(path))}
    assert len(tree) == len(prefixes)  # each beginning once


@given(drawn_paths())
def test_positions_and_predictors_follow_the_path(paths: list[Example]) -> None:
    tree = merged(paths)
    batch = collate([tree, tree], 0)
    for indices in path_indices(tree):
        assert batch.position_ids[1, indices].tolist() == list(range(len(indices)))
        follows = dict(zip(indices[1:].tolist(), indices[:-1].tolist(), strict=True))
        for predictor, target in batch.trained.T.tolist():
            if target in follows:
                assert predictor == follows[target]
    assert batch.trained_tokens == 2 * tree.trained_tokens()


@given(drawn_paths(), st.integers(1, 20))
def test_a_split_tree_fits_and_trains_the_same(paths: list[Example], max_tokens: int) -> None:
    tree = PrefixTree()
    for path in paths:
        before, new = tree.tokens, tree.new_tokens(path.input_ids)
        tree.add(path.input_ids, path.labels)
        assert tree.tokens == before + new
    parts = split_tree(paths_of(merged(paths)), max_tokens)
    assert sum((losses(paths_of(part)) for part in parts), Counter()) == losses(paths)
    assert all(len(part) <= max_tokens or not part.branches for part in parts)


def test_packing_and_storing_keep_branches() -> None:
    trees = [tree_of(seed, where=f"x:{seed}") for seed in (1, 2)]
    linear = paths_of(trees[0])[-1]
    sequence = join_documents([trees[0], linear, trees[1]])
    columns = Columns(None)
    writer = ExampleWriter(columns)
    for document in split_documents(sequence):
        writer.add(document)
    store = ExampleStore(columns.finish(EXAMPLE_COLUMNS))
    for stored, example in zip(store, [trees[0], linear, trees[1]], strict=True):
        assert stored.branches == example.branches
        assert np.array_equal(stored.input_ids, example.input_ids) and np.array_equal(stored.labels, example.labels)
    batch = collate([sequence], 0)
    alone = [collate([document], 0).position_ids[0].tolist() for document in split_documents(sequence)]
    assert batch.position_ids[0].tolist() == [position for positions in alone for position in positions]


def section(**settings: Any) -> Data:
    return Data.model_validate({"train": [{"path": "x.jsonl"}], **settings})


def test_a_tree_above_max_length_loses_only_answers_above_it() -> None:
    tree = tree_of(3, turns=5)
    paths = paths_of(tree)
    whole = fit_length(Encoded(tree), section(max_length=len(tree)))
    assert whole.examples == [tree] and not whole.overlong_answers
    limit = len(paths[-1])
    several = fit_length(Encoded(tree), section(max_length=limit))
    assert len(several.examples) > 1 and all(len(example) <= limit for example in several.examples)
    assert losses([path for part in several.examples for path in paths_of(part)]) == losses(paths)
    apart = fit_length(Encoded(tree), section(max_length=limit), shares_prefixes=False)
    assert not any(example.branches for example in apart.examples) and losses(apart.examples) == losses(paths)
    short = fit_length(Encoded(tree), section(max_length=limit - 1))
    assert short.overlong_answers == 1
    assert losses([path for part in short.examples for path in paths_of(part)]) == losses(paths[:-1])
    cut = fit_length(Encoded(tree), section(max_length=limit - 1, overlong="truncate"))
    assert cut.truncated and cut.overlong_answers == 0
    assert not fit_length(Encoded(tree), section(max_length=3)).examples
