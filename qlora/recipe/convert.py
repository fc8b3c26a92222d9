"""Another trainer's file -> a recipe, with a word on every key that could not be carried over."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from qlora.config import Document, Path, Place, Problem, complain, dotted, parse, read_text, validate, write
from qlora.config.error_messages import shown
from qlora.errors import InputError
from qlora.recipe.aliases import ALIASES, REMEDIES, SECTION_WORDS
from qlora.recipe.other_trainers import ALWAYS, DONE_ANYWAY, INSTEAD, TOOLS, Tool, recognised
from qlora.recipe.recipe import SECTIONS, accumulated, between, from_mapping
from qlora.recipe.resolve import ResolvedSettings
from qlora.utils.atomic_files import read_json
from qlora.utils.redact import redacted

PLACEHOLDER = "data/train.jsonl"
ACCUMULATED = "gradient_accumulation_steps"  # read together with the micro-batch
Settings = dict[str, Any]  # `section.key` -> value


@dataclass(frozen=True)
class Converted:
    """A recipe's text, the tool it came from, and what is worth a line each."""

    text: str
    tool: str
    notes: tuple[str, ...]  # what was read as what
    anyway: tuple[str, ...]  # keys that ask for what qlora does without being told
    left: tuple[str, ...]  # keys that could not be carried over, each with the reason


def convert(path: str) -> Converted:
    """The recipe that says what an Axolotl, TRL or LLaMA-Factory file says; it passes the strict reading of recipes.

    RecipeError if the file can't be read; InputError if it is none of the three, or names no model.
    """
    document = parse(read_text(path), path)
    complain(document.problems)
    if not isinstance(document.value, Mapping) or (tool := recognised({*document.value})) is None:
        names = ", ".join(each.name for each in TOOLS)
        raise InputError(f"{path}: no key of {names} is in it. `qlora check` reads recipes of qlora's own.")
    values, left = _data_sets(dict(document.value), FilePath(path).parent)
    anyway, unknown, known = _sorted(values)
    said = _said(Document(known, document.places), path)
    left += unknown + [_line(problem) for problem in said.problems]
    left += [f"{key}: {meant}" for key, meant in tool.unsaid.items() if key not in known]
    both = accumulated(said.over(_defaults(tool, known)))
    # Both hold the notes on the defaults first, which nobody wrote.
    notes = [note for note in both.notes if note in said.notes or note.startswith(f"read {ACCUMULATED} ")]
    settings = _readable(both.settings, left)
    if "model.name" not in settings:
        raise InputError(f"{path}: names no model; a recipe needs one.")
    if "data.train" not in settings:
        left.append(f"data.train: the file names no data. {PLACEHOLDER} stands there instead.")
        settings["data.train"] = PLACEHOLDER
    theirs = _not_ours(settings, {*settings} - {*said.settings})
    text = _text(path, tool, settings, theirs, left)
    from_mapping(parse(text, "recipe").value)  # what was written is a recipe, or this is our mistake
    return Converted(text, tool.name, tuple(notes), tuple(anyway), tuple(left))


def _sorted(values: Mapping[str, Any]) -> tuple[list[str], list[str], dict[str, Any]]:
    """Keys that need no carrying, keys that can't be carried (with the reason), and the rest with their values."""
    anyway, unknown, known = [], [], {}
    for key, value in values.items():
        if value is None or value == [] or value == {}:
            anyway.append(f"{key}: empty")
        elif key in ALIASES or key in SECTION_WORDS:
            known[key] = value
        elif key in DONE_ANYWAY and (DONE_ANYWAY[key] == ALWAYS or value in DONE_ANYWAY[key]):
            anyway.append(f"{key}: {_brief(value)}")
        else:
            advice = INSTEAD.get(key) or REMEDIES.get(key) or "qlora has no counterpart."
            unknown.append(f"{key}: {_brief(value)}. {advice}")
    return anyway, unknown, known


def _said(document: Document, source: str) -> ResolvedSettings:
    """The keys as settings, through the aliases."""
    said = ResolvedSettings(SECTIONS, source, document.places, [])
    return said.take(((key,), value, said.place((key,))) for key, value in document.value.items())


def _defaults(tool: Tool, written: Mapping[str, Any]) -> ResolvedSettings:
    """What the tool does where its file is silent; LLaMA-Factory's alpha is twice the rank."""
    found = {key: value for key, value in tool.defaults.items() if key not in written}
    if tool.name == "LLaMA-Factory":
        rank = written.get("lora_rank", tool.defaults["lora_rank"])
        found["lora_alpha"] = 2 * rank if isinstance(rank, int) else None
    if {"quantization_bit", "adapter", "load_in_8bit", "load_in_4bit"} & {*written}:
        found.pop("load_in_4bit", None)
    if tool.name == "TRL" and written.get("load_in_4bit") is True:
        found["use_bnb_nested_quant"] = False
    said = _said(Document(found), tool.name)
    return said.take((tuple(key.split(".")), value, said.place((key,))) for key, value in tool.habits.items())


def _readable(settings: Mapping[str, Any], left: list[str]) -> Settings:
    """The settings that the strict reading takes; a line in `left` for each that it does not."""
    kept = dict(settings)
    while True:
        good: dict[str, Any] = {}
        wrong: list[tuple[Path, str]] = []
        for name, section in SECTIONS.items():
            inner = {key.split(".")[1]: value for key, value in kept.items() if key.split(".")[0] == name}
            paths: dict[Place, Path] = {}
            found, problems = validate(section, inner, _Places(name, paths))
            good |= {name: found} if found is not None else {}
            wrong += [(paths[place], text) for place, text in problems]
        wrong += [(tuple(key.split(".")), text) for key, text in between(good).items()]
        present = [(path, text) for path, text in wrong if ".".join(map(str, path[:2])) in kept]
        if not present:
            return kept
        for path, text in present:
            left.append(f"{dotted(path)}: {_taken_out(kept, path)}{text}")


@dataclass(frozen=True)
class _Places:
    """A place for each path of a section, and the way back."""

    section: str
    paths: dict[Place, Path]

    def __call__(self, path: Path) -> Place:
        place = Place("", 0, dotted((self.section, *path)))
        self.paths[place] = (self.section, *path)
        return place


def _taken_out(settings: Settings, path: Path) -> str:
    """Take the value at a path out of the settings, as deep as it goes; what it was, if that is short."""
    key = ".".join(map(str, path[:2]))
    holder, inner = settings.get(key), path[2:]
    step: Any
    for step in inner[:-1]:
        holder = holder[step] if isinstance(holder, list | dict) else None
    if inner and isinstance(holder, dict) and inner[-1] in holder:
        return f"{_brief(holder.pop(inner[-1]))}; "
    return f"{_brief(settings.pop(key))}; " if key in settings else ""


def _not_ours(settings: Mapping[str, Any], unwritten: set[str]) -> list[str]:
    """Which of the tool's defaults are not qlora's; the others are taken out, as they go without saying."""
    ours = from_mapping({"model": "m", "data": {"train": PLACEHOLDER}})[0].model_dump()
    return [key for key in settings if key in unwritten and settings[key] != ours[key.split(".")[0]][key.split(".")[1]]]


def _text(path: str, tool: Tool, settings: Settings, theirs: list[str], left: list[str]) -> str:
    """The recipe, section by section in the house's order, under comments on what it was made of."""
    source = FilePath(path).name
    defaults = from_mapping({"model": "m", "data": {"train": PLACEHOLDER}})[0].model_dump()
    nested: dict[str, dict[str, Any]] = {}
    for section, kind in SECTIONS.items():
        for key in kind.model_fields:
            value = settings.get(f"{section}.{key}", defaults[section][key])
            if value != defaults[section][key] or f"{section}.{key}" in ("model.name", "data.train"):
                nested.setdefault(section, {})[key] = value
    head = [
        f"From {tool.name}'s {source}, by `qlora convert`.",
        "What is not here is qlora's default: `qlora recipes show reference`.",
    ]
    if theirs:
        head.append(f"{tool.name}'s defaults, which {source} leaves unsaid: {', '.join(theirs)}")
    if left:
        head += ["Could not be carried over:", *(f"  {line}" for line in left)]
    return "".join(f"# {_one_line(redacted(line))}\n" for line in head) + write(nested)


def _data_sets(values: dict[str, Any], folder: FilePath) -> tuple[dict[str, Any], list[str]]:
    """LLaMA-Factory's names between commas as files, through its dataset_info.json where that is at hand."""
    names, left = values.get("dataset"), []
    if not isinstance(names, str):
        return values, []
    info = _dataset_info(values.pop("dataset_dir", None), folder)
    paths = []
    for name in (each.strip() for each in names.split(",")):
        entry = info.get(name)
        found = entry.get("file_name") or entry.get("hf_hub_url") if isinstance(entry, dict) else None
        if not found and not FilePath(name).suffix:
            left.append(f"dataset: {name} is a name in dataset_info.json. Write its file or hub name in data.train.")
        paths.append({"path": str(found or name)})
    return {**values, "dataset": paths}, left


def _dataset_info(stated: Any, folder: FilePath) -> dict[str, Any]:
    for place in [FilePath(str(stated)), folder / str(stated)] if stated else [folder, folder / "data"]:
        try:
            info = read_json(place / "dataset_info.json")
        except (OSError, ValueError):
            continue
        return {
            name: {**entry, "file_name": str(place / entry["file_name"])} if "file_name" in entry else entry
            for name, entry in info.items()
            if isinstance(entry, dict)
        }
    return {}


def _line(problem: Problem) -> str:
    return f"{problem[0].key}: {problem[1]}"


def _brief(value: Any) -> str:
    return value if isinstance(value, str) and len(value) <= 60 else shown(value)


def _one_line(text: str) -> str:
    return " ".join(text.split()) if not text.startswith("  ") else "  " + " ".join(text.split())
