"""The prose that the embedded base learns to read: documentation that every Python carries in its standard library.

`documents()` gives paragraphs of English out of the docstrings and `pydoc_data.topics` of the running interpreter;
`frequent_words()` gives the plain words that the generated tasks of `make_tasks.py` are built from.
The text is the Python Software Foundation's, under the PSF licence; another Python version gives slightly other text.
"""

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

LEFT_OUT = {"__pycache__", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}
SHORTEST_PARAGRAPH = 60  # characters
PROSE_SHARE = 0.90  # letters and spaces among the characters; below it a paragraph is a table or code


def documents() -> list[str]:
    """Give one string a docstring or help topic: its prose paragraphs, unwrapped, each paragraph only once overall."""
    seen: set[str] = set()
    kept = []
    for text in [*_docstrings(_stdlib()), *topics.values()]:
        paragraphs = [each for each in _paragraphs(text) if each not in seen]
        seen.update(paragraphs)
        if paragraphs:
            kept.append("\n\n".join(paragraphs))
    return kept


def module_summaries() -> list[tuple[str, str]]:
    """Give (module, the first sentence of its docstring) for every public top-level module that has a short one."""
    found = []
    for path in sorted([*_stdlib().glob("*.py"), *_stdlib().glob("*/__init__.py")]):
        name = path.parent.name if path.name == "__init__.py" else path.stem
        summary = " ".join((_docstring_of_module(path) or "").split("\n\n")[0].split())
        if not name.startswith("_") and name not in LEFT_OUT and 20 <= len(summary) <= 90 and summary.isascii():
            found.append((name, summary.rstrip(".") + "."))
    return found


def frequent_words(texts: Sequence[str], count: int) -> list[str]:
    """Give the `count` most frequent lower-case words of 3 to 9 letters, the most frequent first."""
    counts = Counter(word for text in texts for word in re.findall(r"\b[a-z]{3,9}\b", text))
    return [word for word, _ in sorted(counts.items(), key=lambda each: (-each[1], each[0]))[:count]]


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _sources(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        # config-3.x-... holds build files that differ between machines
        if not LEFT_OUT & set(parts) and not parts[0].startswith("config-"):
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
        flowing = " ".join(block.split())
        plain = sum(char.isalpha() or char == " " for char in flowing)
        long_enough = len(flowing) >= SHORTEST_PARAGRAPH
        if long_enough and flowing.isascii() and ">>>" not in flowing and plain >= PROSE_SHARE * len(flowing):
            yield flowing
