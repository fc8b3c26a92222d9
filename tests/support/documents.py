"""The project's Markdown documents and their fenced blocks."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from support.paths import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>gpu|tool) -->\n)?^```(?P<words>[^\n]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


class Fence(NamedTuple):
    """A fenced block: file and line, the words after its backticks (or its mark), its text."""

    where: str
    words: tuple[str, ...]
    text: str


def fences(path: Path) -> Iterator[Fence]:
    """Every fenced block of a Markdown file."""
    content = path.read_text(encoding="utf-8")
    for match in FENCE.finditer(content):
        line = content.count("\n", 0, match.start()) + 1
        yield Fence(
            f"{path.relative_to(ROOT)}:{line}", tuple((match["words"] or match["mark"] or "").split()), match["text"]
        )
