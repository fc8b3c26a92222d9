"""Prose for the embedded base model: the documentation in the Python standard library.

`documents()` returns English paragraphs of the docstrings and of `pydoc_data.topics` of the running interpreter;
`frequent_words()` returns the words of the tasks in `make_tasks.py`. The text is copyright of the Python Software
Foundation, under the PSF license; another Python version has slightly different text.
"""

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

EXCLUDED = {"__pycache__", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}
SHORTEST_PARAGRAPH = 60  # characters
PROSE_SHARE = 0.90  # share of letters and spaces; below, a paragraph is a table or code


def documents() -> list[str]:
    """One string per docstring or help topic: its prose paragraphs, unwrapped, without duplicates over all."""
    seen: set[str] = set()
    texts = []
    for text in [*_docstrings(_stdlib()), *topics.values()]:
        paragraphs = [paragraph for paragraph in _paragraphs(text) if paragraph not in seen]
        seen.update(paragraphs)
        if paragraphs:
            texts.append("\n\n".join(paragraphs))
    return texts


def module_summaries() -> list[tuple[str, str]]:
    """(module, first sentence of its docstring) of every public top-level module with a short one."""
    summaries = []
    for path in sorted([*_stdlib().glob("*.py"), *_stdlib().glob("*/__init__.py")]):
        name = path.parent.name if path.name == "__init__.py" else path.stem
        summary = " ".join((_docstring_of_module(path) or "").split("\n\n")[0].split())
        if not name.startswith("_") and name not in EXCLUDED and 20 <= len(summary) <= 90 and summary.isascii():
            summaries.append((name, summary.rstrip(".") + "."))
    return summaries


def frequent_words(texts: Sequence[str], count: int) -> list[str]:
    """The `count` most frequent lower-case words of 3 to 9 letters, most frequent first."""
    counts = Counter(word for text in texts for word in re.findall(r"\b[a-z]{3,9}\b", text))
    return [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:count]]


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _sources(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        # config-3.x-... has build files that differ between machines
        if not EXCLUDED & set(parts) and not parts[0].startswith("config-"):
            yield path


def _docstrings(root: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in _sources(root):
        for node in ast.walk(_parsed(path)):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                yield text


def _docstring_of_module(path: Path) -> str | None:
    return ast.get_docstring(_parsed(path))


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # a few files are templates or in another encoding
        return ast.Module(body=[], type_ignores=[])


def _paragraphs(text: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        letters = sum(char.isalpha() or char == " " for char in paragraph)
        is_prose = paragraph.isascii() and ">>>" not in paragraph and letters >= PROSE_SHARE * len(paragraph)
        if len(paragraph) >= SHORTEST_PARAGRAPH and is_prose:
            yield paragraph
