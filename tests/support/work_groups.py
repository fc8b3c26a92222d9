"""Which process runs which tests: a folder's run in one, where what they share is built once; the longest come first.

The last folders are short, so that both processes end at about the same time.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
from xdist.scheduler import LoadGroupScheduling

# By their processor time; the others, of a few seconds, come last.
LONGEST = (
    "runs", "training", "data", "model", "parity", "gpu", "exporters", "docs", "adapters", "laws", "fault_injection",
    "cli", "recipe", "memory", "distributed",
)  # fmt: skip


class FolderScheduling(LoadGroupScheduling):
    """The tests of a folder are a unit of work, as are those of an `xdist_group`."""

    def _split_scope(self, nodeid: str) -> str:
        group = str(super()._split_scope(nodeid))
        return str(Path(group.partition("::")[0]).parent) if "::" in group else group


def place(path: Path) -> int:
    """The position of a test file's folder."""
    return LONGEST.index(path.parent.name) if path.parent.name in LONGEST else len(LONGEST)


def longest_first(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The tests by their folders, and otherwise in their order."""
    return sorted(items, key=lambda item: place(item.path))
