"""Resolved settings: a recipe file and overrides as `section.key` settings; aliases expanded, later values win."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from qlora.config import Location, Path, Problem, Section
from qlora.config.error_messages import shown
from qlora.errors import did_you_mean
from qlora.recipe.aliases import ACCUMULATION, ALIASES, REMEDIES, RENAMED_VALUES, target_keys, translate

Sections = Mapping[str, type[Section]]
Entry = tuple[Path, Any, Location]

EXCLUSIVE = (  # an override of one setting of a pair removes the other one of the file
    ("train.epochs", "train.max_steps"),
    ("data.eval", "data.eval_fraction"),
    ("train.global_batch", ACCUMULATION),
)


@dataclass
class ResolvedSettings:
    """Settings by `section.key`, their locations, their problems, and a note for each alias."""

    sections: Sections
    source: str
    written: dict[Path, Location]  # every key of the file or the overrides, as written
    problems: list[Problem]
    settings: dict[str, Any] = field(default_factory=dict)
    locations: dict[Path, Location] = field(default_factory=dict)  # of the settings, aliases under both names
    notes: list[str] = field(default_factory=list)
    complete_sections: set[str] = field(default_factory=set)  # sections that were written as one value

    def location(self, path: Path) -> Location:
        """The location of a setting, or of the nearest group around it."""
        for size in range(len(path), 0, -1):
            location = self.locations.get(path[:size]) or self.written.get(path[:size])
            if location is not None:
                return location.child(path[size:])
        return Location(self.source, 0, "").child(path)

    def add(self, entries: Iterable[Entry]) -> "ResolvedSettings":
        """Set all entries, defaults of aliases last."""
        defaults: list[tuple[str, str, tuple[Any, ...], Location]] = []
        for path, value, location in entries:
            if len(path) == 1:
                self._add_top_level(str(path[0]), value, location, defaults)
            elif len(path) == 2:
                self._set(str(path[0]), str(path[1]), value, location)
            else:
                key = f"{path[0]}.{path[1]}"
                self.problems.append((location, f"can't be set alone. Set all of {key}, as in {key}={{...}}."))
        for name, key, values, location in defaults:
            self._add_default(name, key, values, location)
        return self

    def override_with(self, overrides: "ResolvedSettings") -> "ResolvedSettings":
        """Both together; where both have a setting, the one of `overrides` counts."""
        removed = {key for key in self.settings if key.split(".")[0] in overrides.complete_sections}
        removed |= set(overrides.settings)
        for pair in EXCLUSIVE:
            if any(overrides.settings.get(key) is not None for key in pair):
                removed.update(pair)
        kept = {key: value for key, value in self.settings.items() if key not in removed}
        written = {path: location for path, location in self.written.items() if _key(path) not in removed}
        locations = {path: location for path, location in self.locations.items() if _key(path) not in removed}
        return ResolvedSettings(
            self.sections,
            self.source,
            written | overrides.written,
            self.problems + overrides.problems,
            kept | overrides.settings,
            locations | overrides.locations,
            self.notes + overrides.notes,
        )

    def _add_top_level(self, name: str, value: Any, location: Location, defaults: list[Any]) -> None:
        translation = translate(name, value)
        if translation is not None:
            self._add_alias(name, value, location, translation, defaults)
        elif name not in self.sections:
            self.problems.append((location, f"not a setting.{self._suggest(name)}"))
        elif name == "model" and isinstance(value, str):
            self.complete_sections.add(name)
            self._set("model", "name", value, location)
        elif isinstance(value, Mapping):
            self.complete_sections.add(name)
            for key, item in value.items():
                self._set(name, str(key), item, self.written.get((name, key)) or location.child((str(key),)))
        elif value is not None:
            known = ", ".join(self.sections[name].model_fields)
            name_alone = "a text, its name, or " if name == "model" else ""
            self.problems.append((location, f"found {shown(value)}, allowed: {name_alone}a group of {known}."))

    def _add_alias(
        self, name: str, value: Any, location: Location, translation: Mapping[str, Any], defaults: list[Any]
    ) -> None:
        for target, our_value in translation.items():
            if target.endswith("?"):
                defaults.append((f"{name}: {_text(value)}", target[:-1], our_value, location))
                continue
            section, key = target.split(".")
            if target != ACCUMULATION:
                same = our_value is value
                note = f"read {name} as {target}" if same else _note(f"{name}: {_text(value)}", target, our_value)
                self.notes.append(note)
            self._set(section, key, our_value, location._replace(key=f"{location.key} (read as {target})"), alias=True)

    def _set(self, section: str, key: str, value: Any, location: Location, alias: bool = False) -> None:
        path = f"{section}.{key}"
        if section not in self.sections:
            self.problems.append((location, f"not a setting.{self._suggest(section)}"))
        elif key not in self.sections[section].model_fields and not (alias and path == ACCUMULATION):
            self.problems.append((location, f"not a setting.{self._suggest_in(section, key)}"))
        elif path in self.settings or (path == ACCUMULATION and "train.global_batch" in self.settings):
            other = self.locations.get((section, key)) or self.location(("train", "global_batch"))
            self.problems.append((location, f"set twice, also by {other}. Keep one."))
        else:
            renamed = RENAMED_VALUES.get(path, {}).get(value) if isinstance(value, str) else None
            if renamed:
                self.notes.append(_note(f"{path}: {value}", path, renamed))
            self.settings[path] = renamed or value
            self.locations[(section, key)] = location

    def _add_default(self, name: str, key: str, values: tuple[Any, ...], location: Location) -> None:
        section, _, setting = key.partition(".")
        if key not in self.settings:
            self.notes.append(_note(name, key, values[0]))
            self._set(section, setting, values[0], location._replace(key=f"{location.key} (read as {key})"))
        elif self.settings[key] not in values:
            other = self.locations[(section, setting)]
            self.problems.append((location, f"contradicts {other}: {_text(self.settings[key])}. Keep one of the two."))

    def _suggest(self, name: str) -> str:
        """End of a message about an unknown top-level name."""
        if name in REMEDIES:
            return f" {REMEDIES[name]}"
        elsewhere = [f"{section}.{name}" for section, known in self.sections.items() if name in known.model_fields]
        near = elsewhere or get_close_matches(name, self.sections, 1) or get_close_matches(name, ALIASES, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return hint + did_you_mean("", self.sections)

    def _suggest_in(self, section: str, name: str) -> str:
        """End of a message about an unknown name in a section: where else the name is known, else the nearest."""
        fields = self.sections[section].model_fields
        elsewhere = [f"{other}.{name}" for other, known in self.sections.items() if name in known.model_fields]
        elsewhere += target_keys(name)
        if elsewhere:
            return f" Did you mean {elsewhere[0]!r}?" + did_you_mean("", fields)
        return did_you_mean(name, fields)


def _key(path: Path) -> str:
    return ".".join(str(step) for step in path[:2])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)


def _note(name: str, key: str, value: Any) -> str:
    return f"read {name} as {key}: {_text(value)}"
