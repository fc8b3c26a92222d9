"""Conversion of another trainer's file to a recipe, with a line for every key that could not be converted."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from qlora.config import Document, Location, Path, Problem, dotted, parse, raise_problems, read_text, validate, write
from qlora.config.error_messages import shown
from qlora.errors import InputError
from qlora.recipe.aliases import ALIASES, REMEDIES, SECTION_KINDS
from qlora.recipe.other_trainers import ALWAYS, NO_SETTING_NEEDED, REPLACEMENTS, TOOLS, Tool, recognize
from qlora.recipe.recipe import SECTIONS, from_mapping, with_global_batch
from qlora.recipe.resolve import ResolvedSettings
from qlora.recipe.rules import conflicts_between
from qlora.utils.atomic_files import read_json
from qlora.utils.redact import redacted

PLACEHOLDER = "data/train.jsonl"
ACCUMULATION_KEY = "gradient_accumulation_steps"  # read together with the micro-batch
Settings = dict[str, Any]  # `section.key` -> value


@dataclass(frozen=True)
class Converted:
    """A recipe's text, the tool it came from, and one line for each key that is worth one."""

    text: str
    tool: str
    notes: tuple[str, ...]  # which key was read as which
    no_setting_needed: tuple[str, ...]  # keys for which qlora behaves the same without a setting
    not_converted: tuple[str, ...]  # keys that could not be converted, each with the reason


def convert(path: str) -> Converted:
    """The recipe for an Axolotl, TRL or LLaMA-Factory file; it passes the strict reading of recipes.

    RecipeError if the file can't be read; InputError if it is none of the three, or names no model.
    """
    document = parse(read_text(path), path)
    raise_problems(document.problems)
    if not isinstance(document.value, Mapping) or (tool := recognize({*document.value})) is None:
        names = ", ".join(tool.name for tool in TOOLS)
        raise InputError(f"{path}: found no key of {names}. `qlora check` reads qlora's own recipes.")
    values, not_converted = _resolve_datasets(dict(document.value), FilePath(path).parent)
    no_setting_needed, unknown, known = _classify(values)
    resolved = _settings_of(Document(known, document.locations), path)
    not_converted += unknown + [_line(problem) for problem in resolved.problems]
    not_converted += [f"{key}: {message}" for key, message in tool.missing_keys.items() if key not in known]
    combined = with_global_batch(_defaults(tool, known).override_with(resolved))
    # The combined notes include those on the tool's defaults, which are not keys of the file.
    notes = [note for note in combined.notes if note in resolved.notes or note.startswith(f"read {ACCUMULATION_KEY} ")]
    settings = _valid_settings(combined.settings, not_converted)
    if "model.name" not in settings:
        raise InputError(f"{path}: names no model. Add one under its key, base_model or model_name_or_path.")
    if "data.train" not in settings:
        not_converted.append(f"data.train: the file names no data. {PLACEHOLDER} is a placeholder.")
        settings["data.train"] = PLACEHOLDER
    tool_defaults = _differing_defaults(settings, {*settings} - {*resolved.settings})
    text = _recipe_text(path, tool, settings, tool_defaults, not_converted)
    from_mapping(parse(text, "recipe").value)  # an error here is a bug: the text must be a valid recipe
    return Converted(text, tool.name, tuple(notes), tuple(no_setting_needed), tuple(not_converted))


def _classify(values: Mapping[str, Any]) -> tuple[list[str], list[str], dict[str, Any]]:
    """Keys that need no setting, keys without a counterpart (with the reason), and the other keys with values."""
    no_setting_needed, unknown, known = [], [], {}
    for key, value in values.items():
        if value is None or value == [] or value == {}:
            no_setting_needed.append(f"{key}: empty")
        elif key in ALIASES or key in SECTION_KINDS:
            known[key] = value
        elif key in NO_SETTING_NEEDED and (NO_SETTING_NEEDED[key] == ALWAYS or value in NO_SETTING_NEEDED[key]):
            no_setting_needed.append(f"{key}: {_short(value)}")
        else:
            advice = REPLACEMENTS.get(key) or REMEDIES.get(key) or "qlora has no counterpart."
            unknown.append(f"{key}: {_short(value)}. {advice}")
    return no_setting_needed, unknown, known


def _settings_of(document: Document, source: str) -> ResolvedSettings:
    """The keys as settings, through the aliases."""
    resolved = ResolvedSettings(SECTIONS, source, document.locations, [])
    return resolved.add(((key,), value, resolved.location((key,))) for key, value in document.value.items())


def _defaults(tool: Tool, written: Mapping[str, Any]) -> ResolvedSettings:
    """The tool's settings for keys that its file leaves out; LLaMA-Factory's alpha is twice the rank."""
    defaults = {key: value for key, value in tool.defaults.items() if key not in written}
    if tool.name == "LLaMA-Factory":
        rank = written.get("lora_rank", tool.defaults["lora_rank"])
        defaults["lora_alpha"] = 2 * rank if isinstance(rank, int) else None
    if {"quantization_bit", "adapter", "load_in_8bit", "load_in_4bit"} & {*written}:
        defaults.pop("load_in_4bit", None)
    if tool.name == "TRL" and written.get("load_in_4bit") is True:
        defaults["use_bnb_nested_quant"] = False
    resolved = _settings_of(Document(defaults), tool.name)
    fixed = tool.fixed_settings.items()
    return resolved.add((tuple(key.split(".")), value, resolved.location((key,))) for key, value in fixed)


def _valid_settings(settings: Mapping[str, Any], not_converted: list[str]) -> Settings:
    """The settings that are valid in a recipe; a line in `not_converted` for each of the others."""
    remaining = dict(settings)
    while True:
        sections: dict[str, Any] = {}
        problems: list[tuple[Path, str]] = []
        for name, kind in SECTIONS.items():
            values = {key.split(".")[1]: value for key, value in remaining.items() if key.split(".")[0] == name}
            paths: dict[Location, Path] = {}
            section, section_problems = validate(kind, values, _PathRecorder(name, paths))
            if section is not None:
                sections[name] = section
            problems += [(paths[location], text) for location, text in section_problems]
        problems += [(tuple(key.split(".")), text) for key, text in conflicts_between(sections).items()]
        invalid = [(path, text) for path, text in problems if ".".join(map(str, path[:2])) in remaining]
        if not invalid:
            return remaining
        for path, text in invalid:
            not_converted.append(f"{dotted(path)}: {_remove(remaining, path)}{text}")


@dataclass(frozen=True)
class _PathRecorder:
    """A location for each path of a section; records which path it belongs to."""

    section: str
    paths: dict[Location, Path]

    def __call__(self, path: Path) -> Location:
        location = Location("", 0, dotted((self.section, *path)))
        self.paths[location] = (self.section, *path)
        return location


def _remove(settings: Settings, path: Path) -> str:
    """Remove the value at a path, nested if possible; returns its text followed by `; `."""
    key = ".".join(map(str, path[:2]))
    container, inner = settings.get(key), path[2:]
    step: Any
    for step in inner[:-1]:
        container = container[step] if isinstance(container, list | dict) else None
    if inner and isinstance(container, dict) and inner[-1] in container:
        return f"{_short(container.pop(inner[-1]))}; "
    return f"{_short(settings.pop(key))}; " if key in settings else ""


def _qlora_defaults() -> dict[str, Any]:
    return from_mapping({"model": "m", "data": {"train": PLACEHOLDER}})[0].model_dump()


def _differing_defaults(settings: Mapping[str, Any], unwritten: set[str]) -> list[str]:
    """The tool's defaults that differ from qlora's; those that are the same need not be written."""
    defaults = _qlora_defaults()
    keys = [key for key in settings if key in unwritten]
    return [key for key in keys if settings[key] != defaults[key.split(".")[0]][key.split(".")[1]]]


def _recipe_text(path: str, tool: Tool, settings: Settings, tool_defaults: list[str], not_converted: list[str]) -> str:
    """The recipe in the order of its sections, after comments on what it was made from."""
    source = FilePath(path).name
    defaults = _qlora_defaults()
    nested: dict[str, dict[str, Any]] = {}
    for section, kind in SECTIONS.items():
        for key in kind.model_fields:
            value = settings.get(f"{section}.{key}", defaults[section][key])
            if value != defaults[section][key] or f"{section}.{key}" in ("model.name", "data.train"):
                nested.setdefault(section, {})[key] = value
    head = [
        f"Made from {tool.name}'s {source} by `qlora convert`.",
        "Settings that are missing here have qlora's defaults: `qlora recipes show reference`.",
    ]
    if tool_defaults:
        head.append(f"{tool.name}'s defaults, which are not in {source}: {', '.join(tool_defaults)}")
    if not_converted:
        head += ["Not converted:", *(f"  {line}" for line in not_converted)]
    return "".join(f"# {_one_line(redacted(line))}\n" for line in head) + write(nested)


def _resolve_datasets(values: dict[str, Any], folder: FilePath) -> tuple[dict[str, Any], list[str]]:
    """LLaMA-Factory's comma-separated names as files, looked up in its dataset_info.json if that exists."""
    names, not_converted = values.get("dataset"), []
    if not isinstance(names, str):
        return values, []
    info = _dataset_info(values.pop("dataset_dir", None), folder)
    paths = []
    for name in (name.strip() for name in names.split(",")):
        entry = info.get(name)
        source = entry.get("file_name") or entry.get("hf_hub_url") if isinstance(entry, dict) else None
        if not source and not FilePath(name).suffix:
            message = f"{name} is a name in dataset_info.json. Write its file or hub name in data.train."
            not_converted.append(f"dataset: {message}")
        paths.append({"path": str(source or name)})
    return {**values, "dataset": paths}, not_converted


def _dataset_info(dataset_dir: Any, folder: FilePath) -> dict[str, Any]:
    folders = [FilePath(str(dataset_dir)), folder / str(dataset_dir)] if dataset_dir else [folder, folder / "data"]
    for candidate in folders:
        try:
            info = read_json(candidate / "dataset_info.json")
        except (OSError, ValueError):
            continue
        return {
            name: {**entry, "file_name": str(candidate / entry["file_name"])} if "file_name" in entry else entry
            for name, entry in info.items()
            if isinstance(entry, dict)
        }
    return {}


def _line(problem: Problem) -> str:
    return f"{problem[0].key}: {problem[1]}"


def _short(value: Any) -> str:
    return value if isinstance(value, str) and len(value) <= 60 else shown(value)


def _one_line(text: str) -> str:
    return " ".join(text.split()) if not text.startswith("  ") else "  " + " ".join(text.split())
