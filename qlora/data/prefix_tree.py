"""Prefix trees of token paths: an example whose answers share the beginning of their contexts, computed once.

A path is what inference sees of one answer, from the first token on, with the answer. Paths that begin with the same
tokens share them: the tree is laid out as one segment of tokens (the trunk) and branches, each of which continues a
token before it. A token sees its ancestors only, so that the loss of a tree is the sum of the losses of its paths.
"""

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from qlora.data.types import IGNORED, Branch, Example, Ints

Path = tuple[Ints, Ints]  # token ids and labels


class _Node:
    """A segment of tokens without a fork, and the nodes that follow it."""

    __slots__ = ("children", "ids", "labels", "tokens")

    def __init__(self, ids: Ints, labels: Ints) -> None:
        self.ids, self.labels = ids, labels
        self.children: list[_Node] = []
        self.tokens = len(ids)  # of the node and of all nodes below it

    def split(self, length: int) -> None:
        """Keep the first `length` tokens; the rest becomes the only child."""
        rest = _Node(self.ids[length:], self.labels[length:])
        rest.children, rest.tokens = self.children, self.tokens - length
        self.ids, self.labels, self.children = self.ids[:length], self.labels[:length], [rest]


class PrefixTree:
    """Paths merged by their common beginnings. `tokens`: of all nodes."""

    def __init__(self, paths: Iterable[Path] = ()) -> None:
        self._root = _Node(np.zeros(0, np.int32), np.zeros(0, np.int32))
        for ids, labels in paths:
            self.add(ids, labels)

    @property
    def tokens(self) -> int:
        """Tokens of the tree: those that a step computes."""
        return self._root.tokens

    def new_tokens(self, ids: Ints) -> int:
        """How many tokens of a path the tree does not have yet."""
        nodes, shared = self._matching(ids)
        return len(ids) - sum(len(node.ids) for node in nodes[:-1]) - shared

    def add(self, ids: Ints, labels: Ints) -> None:
        """Merge a path into the tree; a token bears loss if it does in one of its paths."""
        nodes, shared = self._matching(ids)
        if shared < len(nodes[-1].ids):
            nodes[-1].split(shared)
        at = 0
        for node in nodes:
            own = labels[at : at + len(node.ids)]
            node.labels = np.where(own != IGNORED, own, node.labels)
            at += len(node.ids)
        if at == len(ids):
            return
        nodes[-1].children.append(_Node(ids[at:], labels[at:]))
        for node in nodes:
            node.tokens += len(ids) - at

    def _matching(self, ids: Ints) -> tuple[list[_Node], int]:
        """The nodes that a path goes through, and how many tokens of the last one it shares."""
        nodes, at = [self._root], 0
        while at < len(ids):
            child = next((node for node in nodes[-1].children if node.ids[0] == ids[at]), None)
            if child is None:
                break
            nodes.append(child)
            shared = _common_length(child.ids, ids[at:])
            at += shared
            if shared < len(child.ids):
                return nodes, shared
        return nodes, len(nodes[-1].ids)

    def example(self, where: str) -> Example:
        """The tree as an example: at each fork the larger part goes on, the others become branches after it."""
        ids, labels, branches = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], list[Branch]()
        waiting = deque([(self._root, -1)])
        at = 0
        while waiting:
            node, parent = waiting.popleft()
            if at:
                branches.append(Branch(at, parent))
            while True:
                ids.append(node.ids)
                labels.append(node.labels)
                at += len(node.ids)
                if not node.children:
                    break
                largest = max(node.children, key=lambda child: child.tokens)
                waiting.extend((child, at - 1) for child in node.children if child is not largest)
                node = largest
        return Example(where, np.concatenate(ids), np.concatenate(labels), branches=tuple(branches))


def _common_length(first: Ints, second: Ints) -> int:
    """Number of equal items at the beginning of both."""
    length = min(len(first), len(second))
    different = first[:length] != second[:length]
    return int(different.argmax()) if different.any() else length


def merge_paths(where: str, paths: Sequence[Path]) -> Example:
    """The example of one or more paths; without branches if each is the beginning of the longest."""
    return Example(where, *paths[0]) if len(paths) == 1 else PrefixTree(paths).example(where)


def paths_of(example: Example) -> list[Example]:
    """The paths of a tree as examples without branches, shortest first; each trained token in the shortest it is in.

    Paths that train nothing are left out; an example without branches is its own path.
    """
    if not example.branches:
        return [example]
    indices = sorted(path_indices(example), key=len)
    used, paths = np.zeros(len(example), dtype=bool), []
    for path in indices:
        labels = np.where(used[path], np.int32(IGNORED), example.labels[path])
        used[path] = True
        paths.append(Example(example.where, example.input_ids[path], labels))
    return [path for path in paths if path.trained_tokens()]


def count_answers(example: Example) -> int:
    """Number of runs of trained tokens of an example without branches."""
    trained = example.labels != IGNORED
    return int((trained[1:] & ~trained[:-1]).sum())


def path_indices(example: Example) -> list[Ints]:
    """For the trunk and each branch, the indices of the tokens from the first of the path to the last."""
    starts = [0, *(branch.start for branch in example.branches)]
    ends = [*starts[1:], len(example)]
    segments = [np.arange(start, end, dtype=np.int32) for start, end in zip(starts, ends, strict=True)]
    paths = [segments[0]]
    for segment, branch in zip(segments[1:], example.branches, strict=True):
        owner = int(np.searchsorted(starts, branch.parent, side="right")) - 1
        context = paths[owner][: len(paths[owner]) - (ends[owner] - 1 - branch.parent)] if owner >= 0 else segment[:0]
        paths.append(np.concatenate([context, segment]))
    return paths


def split_tree(paths: Sequence[Example], max_tokens: int) -> list[Example]:
    """Paths, in their order, merged into as few trees of at most `max_tokens` as a greedy pass needs.

    A path above `max_tokens` is an example of its own.
    """
    trees = list[PrefixTree]()
    for path in paths:
        tree = trees[-1] if trees else None
        if tree is None or tree.tokens + tree.new_tokens(path.input_ids) > max_tokens:
            trees.append(tree := PrefixTree())
        tree.add(path.input_ids, path.labels)
    return [tree.example(paths[0].where) for tree in trees]
