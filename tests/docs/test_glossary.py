"""The words in the last column of docs/glossary.md occur in no identifier, docstring, comment, message or page."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

ROWS = re.findall(r"^\| [^|]+ \| [^|]+ \| ([^|]*) \|$", (ROOT / "docs/glossary.md").read_text(), flags=re.MULTILINE)
BANNED = {word for row in ROWS for word in re.findall(r"`([^`]+)`", row)}
BANNED |= {"said", "told", "obeys", "whoever", "nobody", "the dear", "as it stands", "as they stand"}
WORD = re.compile(rf"(?<![\w-])({'|'.join(sorted(BANNED, key=len, reverse=True))})(?![\w-])", re.IGNORECASE)
ALLOWED = re.compile(
    r"model[ _-]?cards?|card\.py|math\.floor|torch\.floor|\.floor\(|floor_divide|hosted_adamw|<!-- \w+ -->"
    r"|['\"](?:card|cards|parked|unpunished|unsaid)['\"]|[{;]stroke[-:]",  # keys of JSON files; CSS
    re.IGNORECASE,
)
NAMES = ("found", "each", "said", "told", "made", "wanted", "given")
MOST_NAMES = 40
CODE = [
    path for folder in ("qlora", "benchmarks", "scripts", "tests") for path in sorted((ROOT / folder).rglob("*.py"))
]
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
]
PAGES += sorted((ROOT / "recipes").rglob("*.yaml"))


# CSS properties; word lists of generated sentences.
EXEMPT = {"style.py": "stroke", "svg.py": "stroke", "make_data.py": "Park", "make_scenes.py": "parcel"}


def words_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every identifier (split at underscores and capitals), string and comment of a Python file."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.NAME and token.string != "floor":  # math.floor, Tensor.floor
            yield token.start[0], re.sub(r"(?<=[a-z])(?=[A-Z])", " ", token.string).replace("_", " ")
        elif token.type in (tokenize.STRING, tokenize.COMMENT):
            yield token.start[0], token.string


@pytest.mark.parametrize("folder", sorted({path.parent for path in CODE}), ids=lambda path: str(path.relative_to(ROOT)))
def test_code_has_no_word_that_the_glossary_replaces(folder: Path) -> None:
    for path in (path for path in CODE if path.parent == folder and path != Path(__file__)):
        if "attacks" not in path.parts and may_have_a_word(path.read_text(encoding="utf-8")):
            lines = [(line, match[0]) for line, text in words_of(path) if (match := WORD.search(ALLOWED.sub("", text)))]
            assert [(line, word) for line, word in lines if EXEMPT.get(path.name) != word] == [], path


def may_have_a_word(text: str) -> bool:
    """False if no token of a file can have one: a faster answer than that of its tokens."""
    return bool(WORD.search(text) or WORD.search(re.sub(r"(?<=[a-z])(?=[A-Z])|[_-]", " ", text)))


def test_pages_have_no_word_that_the_glossary_replaces() -> None:
    for path in (path for path in PAGES if path.name != "glossary.md"):
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        assert [(i, match[0]) for i, line in lines if (match := WORD.search(ALLOWED.sub("", line)))] == [], path


def test_variables_are_nouns() -> None:
    bound = [
        (path.name, name)
        for path in CODE
        if path.is_relative_to(ROOT / "qlora") and re.search(rf"\b({'|'.join(NAMES)})\b", path.read_text("utf-8"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (name := node.arg if isinstance(node, ast.arg) else getattr(node, "id", "")) in NAMES
        and (isinstance(node, ast.arg) or isinstance(node.ctx, ast.Store))  # type: ignore[attr-defined]
    ]
    assert len(bound) <= MOST_NAMES, bound
