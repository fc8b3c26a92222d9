"""Text paths: the renderings of a conversation that are trained, and where the answers are in each.

The first rendering is that of all turns. An answer that later turns rewrite is trained in a rendering of its own, which
ends with it; so are the answers before it that this rendering has unchanged, such as the steps of one turn.
"""

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Stretch:
    """An answer in a rendering, from `start` to `end` in characters, its end token included. masked: never trained.

    context: where the prompt ends. What the template writes from there to `start` bears no loss.
    """

    context: int
    start: int
    end: int
    trained: bool = True
    masked: bool = False


@dataclass(frozen=True, slots=True)
class TextPath:
    """A rendering and its answers, in order.

    shared: characters at its beginning that the path before it has, too. unclosed: it ends with a trained answer that
    no control token closes.
    """

    text: str
    stretches: tuple[Stretch, ...] = ()
    shared: int = 0
    unclosed: bool = False


@dataclass(frozen=True, slots=True)
class MaskedText:
    """A rendered conversation. text: of all turns. paths: what is trained of it, and what is not."""

    text: str
    paths: tuple[TextPath, ...]
    unlocated: tuple[int, ...] = ()  # answers whose prompt is not the beginning of their rendering: never trained
    end_trained: bool = False  # the last trained answer ends with an end-of-turn token
    unthought: frozenset[int] = frozenset()  # answers whose thought is not in their text

    @property
    def trains(self) -> bool:
        """Whether an answer is trained."""
        return any(stretch.trained for path in self.paths for stretch in path.stretches)


class PathBuilder:
    """Places answers, from the last to the first, in as few renderings as a greedy pass needs."""

    def __init__(self, full: str) -> None:
        self._texts, self._stretches, self._unclosed = [full], [list[Stretch]()], [False]

    def cut(self, end: int) -> None:
        """End the rendering of all turns with its last answer, which no control token closes."""
        self._texts[0], self._unclosed[0] = self._texts[0][:end], self._stretches[0][0].trained

    def place(self, text: str, stretch: Stretch, closed: bool) -> bool:
        """Whether an answer is in a rendering. text: its own rendering up to its end.

        An answer that is not trained gets no rendering of its own. closed: a control token ends it.
        """
        for index in dict.fromkeys((0, len(self._texts) - 1)):
            later = self._stretches[index]
            if self._texts[index].startswith(text) and (not later or stretch.end <= later[-1].context):
                later.append(stretch)
                return True
        if stretch.trained:
            self._texts.append(text)
            self._stretches.append([stretch])
            self._unclosed.append(not closed)
        return stretch.trained

    def paths(self, keep_full: bool) -> tuple[TextPath, ...]:
        """The paths. The rendering of all turns is left out where nothing in it is trained, unless `keep_full`."""
        if len(self._texts) == 1:  # the usual case
            return (TextPath(self._texts[0], tuple(reversed(self._stretches[0])), 0, self._unclosed[0]),)
        trained = any(stretch.trained for stretch in self._stretches[0])
        first = 0 if trained or keep_full else 1
        texts, unclosed = self._texts[first:], self._unclosed[first:]
        shared = [0, *(common_chars(text, base) for base, text in pairwise(texts))]
        stretches = [tuple(reversed(group)) for group in self._stretches[first:]]
        return tuple(TextPath(*parts) for parts in zip(texts, stretches, shared, unclosed, strict=True))


def common_chars(first: str, second: str) -> int:
    """Number of equal characters at the beginning of both."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return low
