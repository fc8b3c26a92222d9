"""What was said: a file and the overrides as settings `section.key`, aliases read, later words over earlier ones."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from qlora.config import Path, Place, Problem, Section
from qlora.config.error_messages import shown
from qlora.errors import did_you_mean
from qlora.recipe.aliases import ACCUMULATION, ALIASES, REMEDIES, counterparts, meaning

Sections = Mapping[str, type[Section]]
Entry = tuple[Path, Any, Place]

RIVALS = (  # of two that exclude each other, an override of one takes the file's other away
    ("train.epochs", "train.max_steps"),
    ("data.eval", "data.eval_fraction"),
    ("train.global_batch", ACCUMULATION),
)


@dataclass
class ResolvedSettings:
    """Settings by `section.key`, their places, what is wrong with them, and what aliases were read as."""

    sections: Sections
    source: str
    written: dict[Path, Place]  # every key of the file or the overrides, as it was written
    problems: list[Problem]
    settings: dict[str, Any] = field(default_factory=dict)
    places: dict[Path, Place] = field(default_factory=dict)  # of the settings, aliases under both names
    notes: list[str] = field(default_factory=list)
    whole: set[str] = field(default_factory=set)  # sections that were written as one value

    def place(self, path: Path) -> Place:
        """The place of a setting, or of the nearest thing around it."""
        for size in range(len(path), 0, -1):
            found = self.places.get(path[:size]) or self.written.get(path[:size])
            if found is not None:
                return found.below(path[size:])
        return Place(self.source, 0, "").below(path)

    def take(self, entries: Iterable[Entry]) -> "ResolvedSettings":
        """Say all entries, weak ones last."""
        weak: list[tuple[str, str, tuple[Any, ...], Place]] = []
        for path, value, place in entries:
            if len(path) == 1:
                self._top(str(path[0]), value, place, weak)
            elif len(path) == 2:
                self._say(str(path[0]), str(path[1]), value, place)
            else:
                key = f"{path[0]}.{path[1]}"
                self.problems.append((place, f"can't be set alone. Give {key} as a whole, as in {key}={{...}}."))
        for name, key, meanings, place in weak:
            self._say_weakly(name, key, meanings, place)
        return self

    def over(self, earlier: "ResolvedSettings") -> "ResolvedSettings":
        """Both together; where both speak of the same, this one counts."""
        gone = {path for path in earlier.settings if path.split(".")[0] in self.whole} | set(self.settings)
        for pair in RIVALS:
            if any(self.settings.get(key) is not None for key in pair):
                gone.update(pair)
        kept = {key: value for key, value in earlier.settings.items() if key not in gone}
        return ResolvedSettings(
            self.sections,
            earlier.source,
            {path: place for path, place in earlier.written.items() if _key(path) not in gone} | self.written,
            earlier.problems + self.problems,
            kept | self.settings,
            {path: place for path, place in earlier.places.items() if _key(path) not in gone} | self.places,
            earlier.notes + self.notes,
        )

    def _top(self, name: str, value: Any, place: Place, weak: list[Any]) -> None:
        meant = meaning(name, value)
        if meant is not None:
            self._alias(name, value, place, meant, weak)
        elif name not in self.sections:
            self.problems.append((place, f"not a setting.{self._nearest(name)}"))
        elif name == "model" and isinstance(value, str):
            self.whole.add(name)
            self._say("model", "name", value, place)
        elif isinstance(value, Mapping):
            self.whole.add(name)
            for key, each in value.items():
                self._say(name, str(key), each, self.written.get((name, key)) or place.below((str(key),)))
        elif value is not None:
            known = ", ".join(self.sections[name].model_fields)
            self.problems.append((place, f"found {shown(value)}, allowed: a group of {known}."))

    def _alias(self, name: str, value: Any, place: Place, meant: Mapping[str, Any], weak: list[Any]) -> None:
        for target, ours in meant.items():
            if target.endswith("?"):
                weak.append((f"{name}: {_yaml(value)}", target[:-1], ours, place))
                continue
            section, key = target.split(".")
            same = ours is value and target != ACCUMULATION
            if target != ACCUMULATION:
                self.notes.append(
                    f"read {name} as {target}" if same else _note(f"{name}: {_yaml(value)}", target, ours)
                )
            self._say(section, key, ours, place._replace(key=f"{place.key} (read as {target})"), alias=True)

    def _say(self, section: str, key: str, value: Any, place: Place, alias: bool = False) -> None:
        path = f"{section}.{key}"
        if section not in self.sections:
            self.problems.append((place, f"not a setting.{self._nearest(section)}"))
        elif key not in self.sections[section].model_fields and not (alias and path == ACCUMULATION):
            self.problems.append((place, f"not a setting.{self._nearest_in(section, key)}"))
        elif path in self.settings or (path == ACCUMULATION and "train.global_batch" in self.settings):
            other = self.places.get((section, key)) or self.place(("train", "global_batch"))
            self.problems.append((place, f"said before, by {other}. Keep one of the two."))
        else:
            self.settings[path] = value
            self.places[(section, key)] = place

    def _say_weakly(self, name: str, key: str, meanings: tuple[Any, ...], place: Place) -> None:
        section, _, inner = key.partition(".")
        if key not in self.settings:
            self.notes.append(_note(name, key, meanings[0]))
            self._say(section, inner, meanings[0], place._replace(key=f"{place.key} (read as {key})"))
        elif self.settings[key] not in meanings:
            other = self.places[(section, inner)]
            self.problems.append((place, f"against {other}: {_yaml(self.settings[key])}. Keep one of the two."))

    def _nearest(self, name: str) -> str:
        """End of a message about an unknown name at the top."""
        if name in REMEDIES:
            return f" {REMEDIES[name]}"
        elsewhere = [f"{section}.{name}" for section, known in self.sections.items() if name in known.model_fields]
        near = elsewhere or get_close_matches(name, self.sections, 1) or get_close_matches(name, ALIASES, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return hint + did_you_mean("", self.sections)

    def _nearest_in(self, section: str, name: str) -> str:
        """End of a message about an unknown name in a section: its own names first, then where else it is known."""
        own = self.sections[section].model_fields
        elsewhere = [f"{other}.{name}" for other, known in self.sections.items() if name in known.model_fields]
        elsewhere += counterparts(name)
        if elsewhere:
            return f" Did you mean {elsewhere[0]!r}?" + did_you_mean("", own)
        return did_you_mean(name, own)


def _key(path: Path) -> str:
    return ".".join(str(step) for step in path[:2])


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)


def _note(name: str, key: str, *value: Any) -> str:
    return f"read {name} as {key}" + "".join(f": {_yaml(each)}" for each in value)
