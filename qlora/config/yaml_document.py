"""Strict YAML: text -> plain values and the location of every key; and back.  The only module that imports yaml.

Scalars are typed as in YAML 1.2: `2e-4` is a number, `no` and `12:30` are text, `012` is twelve. Duplicate keys,
anchors, aliases, tags and further documents are problems with their line. No object is ever constructed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from qlora.config.locations import Location, Path, Problem, dotted
from qlora.config.yaml_scalars import MAX_DIGITS, NOT_TEXT, TYPES, number
from qlora.errors import RecipeError

MAX_DEPTH = 16
MAX_VALUES = 10_000


@dataclass
class Document:
    """Plain values, the location of every key, and the problems of a text as YAML."""

    value: Any
    locations: dict[Path, Location] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def parse(text: str, source: str, root: Path = ()) -> Document:
    """Read one YAML document; with a `root` it is the value of that key, and has no line numbers.

    RecipeError if it can't be read at all; other problems are listed in the document.
    """
    try:
        return _Builder(text, source, root).document()
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        problem = f"the character U+{ord(text[error.position]):04X} is not allowed in a recipe."
        raise RecipeError(f"{Location(source, 0 if root else line, dotted(root))}: {problem}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark and not root else 0
        raise RecipeError(f"{Location(source, line, dotted(root))}: not YAML: {_describe(error)}.") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise RecipeError(f"{Location(source, 0, dotted(root))}: not YAML: {error}.") from None


def write(value: Mapping[str, Any]) -> str:
    """YAML that `parse` reads back to the same values; lists of plain values on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _describe(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "it can't be read"
    if "'\\t'" in problem:
        return "a tab can't start a value or indent a line; use spaces"
    if "mapping values are not allowed" in problem:
        return "a second `:` in one value, or a line indented too far; put text that holds `: ` in quotes"
    return " ".join(problem.split())


_RESOLVERS = {None: TYPES}


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner and parser, with the numbers of YAML 1.2."""

    yaml_implicit_resolvers = _RESOLVERS  # type: ignore[assignment]


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the text that `_Loader` would not read as text."""

    yaml_implicit_resolvers = _RESOLVERS  # type: ignore[assignment]

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _sequence(dumper: yaml.SafeDumper, values: Any) -> yaml.Node:
    flat = not any(isinstance(value, (dict, list, tuple)) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=flat)


_Dumper.add_representer(list, _sequence)
_Dumper.add_representer(tuple, _sequence)


class _Builder:
    """Builds plain values from the parser's events, one at a time, so that depth and size are always bounded."""

    def __init__(self, text: str, source: str, root: Path) -> None:
        self.loader = _Loader(text)
        self.source = source
        self.root = root
        self.result = Document(None)
        self.event_count = 0

    def document(self) -> Document:
        """The first document; a second one is an error."""
        self.loader.get_event()  # start of the stream
        if self.loader.check_event(yaml.StreamEndEvent):
            return self.result
        self.loader.get_event()  # start of the document
        self.result.value = self.value(self.root, 0)
        self.loader.get_event()
        if not self.loader.check_event(yaml.StreamEndEvent):
            raise RecipeError(
                f"{self.locate((), self.loader.peek_event())}: a second document; a recipe is one document. Remove it."
            )
        return self.result

    def locate(self, path: Path, event: yaml.Event) -> Location:
        """The location of `path`, at the line of `event`."""
        line = 0 if self.root or event.start_mark is None else event.start_mark.line + 1
        return Location(self.source, line, dotted(path))

    def problem(self, path: Path, event: yaml.Event, text: str) -> None:
        """Record a problem and read on."""
        self.result.problems.append((self.locate(path, event), text))

    def next(self, path: Path, depth: int) -> Any:
        """The next event. RecipeError if the document is deeper or longer than any recipe."""
        event = self.loader.get_event()
        self.event_count += 1
        if depth > MAX_DEPTH or self.event_count > MAX_VALUES:
            limit = f"more than {MAX_DEPTH} levels deep" if depth > MAX_DEPTH else f"more than {MAX_VALUES} values"
            raise RecipeError(f"{self.locate(path[:2], event)}: {limit}; a recipe has fewer.")
        return event

    def value(self, path: Path, depth: int) -> Any:
        """The plain value of the next node."""
        event = self.next(path, depth)
        self.result.locations.setdefault(path, self.locate(path, event))
        if isinstance(event, yaml.AliasEvent):
            self.problem(path, event, f"an alias (*{event.anchor}) is not allowed. Write the value itself.")
            return ""
        if event.anchor is not None:
            self.problem(path, event, f"an anchor (&{event.anchor}) is not allowed. Remove it.")
        if event.tag is not None:
            self.problem(path, event, f"a tag ({event.tag}) is not allowed; a recipe is plain data. Remove it.")
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(path, event)
        return self.sequence(path, depth) if isinstance(event, yaml.SequenceStartEvent) else self.mapping(path, depth)

    def sequence(self, path: Path, depth: int) -> list[Any]:
        """The items up to the end of the list."""
        items: list[Any] = []
        while not self.loader.check_event(yaml.SequenceEndEvent):
            items.append(self.value((*path, len(items)), depth + 1))
        self.loader.get_event()
        return items

    def mapping(self, path: Path, depth: int) -> dict[str, Any]:
        """The settings up to the end of the group; the first value of duplicate keys."""
        group: dict[str, Any] = {}
        while not self.loader.check_event(yaml.MappingEndEvent):
            start = self.loader.peek_event()
            key = self.value((*path, ""), depth + 1)
            self.result.locations.pop((*path, ""), None)
            inner = (*path, key)
            if not isinstance(key, str):
                self.problem(path, start, "a key must be text. Put quotes around it if this key is intended.")
                self.skip()
            elif key in group:
                self.problem(inner, start, self.duplicate(inner))
                self.skip()
            else:
                self.result.locations[inner] = self.locate(inner, start)
                group[key] = self.value(inner, depth + 1)
        self.loader.get_event()
        return group

    def skip(self) -> None:
        """Read past a value."""
        depth = 0
        while True:
            event = self.next((), depth)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if not depth:
                return

    def duplicate(self, path: Path) -> str:
        """The message for a key that occurred before."""
        line = self.result.locations[path].line
        return f"written twice{f', first on line {line}' if line else ''}. Keep one."

    def scalar(self, path: Path, event: yaml.ScalarEvent) -> Any:
        """The typed value of a plain scalar; a quoted one is text."""
        text = event.value
        tag = self.loader.resolve(yaml.ScalarNode, text, event.implicit) if event.tag is None else ""
        if NOT_TEXT.search(text):
            self.problem(path, event, "a control character is not allowed in a recipe. Remove it.")
            return ""
        if tag.endswith((":int", ":float")):
            if len(text) <= MAX_DIGITS:
                return number(text, tag)
            self.problem(path, event, f"a number of {len(text)} characters. Write a shorter one.")
        if tag.endswith(":bool"):
            return text.lower() == "true"
        return None if tag.endswith(":null") else text
