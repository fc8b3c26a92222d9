"""A recipe: the sections of all packages in one object, read from YAML and overrides, checked, written back."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path as FilePath
from typing import Annotated, Any

from qlora.adapters import Adapter
from qlora.config import (
    REQUIRED,
    Document,
    Location,
    Path,
    Section,
    Shorthand,
    parse,
    raise_problems,
    read_text,
    setting,
    validate,
    write,
)
from qlora.config.error_messages import shown
from qlora.config.overrides import SOURCE, read_overrides
from qlora.data import Data
from qlora.distributed import Distributed
from qlora.errors import RecipeError
from qlora.memory import Memory
from qlora.model import Model
from qlora.quant import Quant
from qlora.recipe.aliases import ACCUMULATION
from qlora.recipe.resolve import ResolvedSettings
from qlora.recipe.rules import conflicts_between
from qlora.training import Optim, Train
from qlora.training.objectives import Objective

Check = Callable[["Recipe"], Iterable[tuple[str, str]]]  # a recipe -> key and message of each further problem
MINIMAL = "A minimal recipe: `model: meta-llama/Llama-3.1-8B` and `data: {train: data/train.jsonl}`."


class Recipe(Section):
    """All settings of a run."""

    model: Annotated[Model, Shorthand("name")] = setting(
        REQUIRED, "the base model; a text is shorthand for {name: text}"
    )
    quant: Quant = setting(Quant(), "how the frozen base model is stored")
    adapter: Adapter = setting(Adapter(), "the trainable layers")
    data: Data = setting(REQUIRED, "training and evaluation data")
    objective: Objective = setting(Objective(), "what is optimized")
    optim: Optim = setting(Optim(), "optimizer and learning rate")
    train: Train = setting(Train(), "length, batch sizes, checkpoints")
    memory: Memory = setting(Memory(), "memory budget, and how to stay below it")
    distributed: Distributed = setting(Distributed(), "how several processes share the work")

    def conflicts(self) -> Mapping[str, str]:
        """Conflicts between sections."""
        return conflicts_between({name: getattr(self, name) for name in SECTIONS})


SECTIONS: Mapping[str, type[Section]] = {
    "model": Model,
    "quant": Quant,
    "adapter": Adapter,
    "data": Data,
    "objective": Objective,
    "optim": Optim,
    "train": Train,
    "memory": Memory,
    "distributed": Distributed,
}


def read(
    path: str | PathLike[str], overrides: Sequence[str] = (), check: Check = lambda recipe: ()
) -> tuple[Recipe, list[str]]:
    """The recipe in a file with its overrides, and a note for each alias; `check` may find further problems.

    RecipeError with a line for every problem, each at its file:line or key.
    """
    name = str(path)
    document = parse(read_text(name), name)
    return _resolve(document, name, overrides, check)


def from_mapping(
    mapping: Mapping[str, Any],
    source: str = "recipe",
    overrides: Sequence[str] = (),
    check: Check = lambda recipe: (),
) -> tuple[Recipe, list[str]]:
    """As `read`, from plain values: `from_mapping({"model": "...", "data": {"train": "data.jsonl"}})`."""
    return _resolve(Document(mapping), source, overrides, check)


def dump(recipe: Recipe) -> str:
    """YAML with every setting, defaults included; reads back to the same recipe."""
    return write(recipe.model_dump())


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe: types, ranges, words, defaults and documentation of each setting."""
    json_schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **json_schema, "title": "qlora recipe"}


def recipes_folder() -> FilePath:
    """The folder of the included recipes: inside the installed package, next to the package in a checkout."""
    package = FilePath(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def _resolve(document: Document, source: str, overrides: Sequence[str], check: Check) -> tuple[Recipe, list[str]]:
    if document.value is None:
        raise RecipeError(f"{source}: is empty. {MINIMAL}")
    if not isinstance(document.value, Mapping):
        raise RecipeError(f"{source}: found {shown(document.value)}, allowed: lines of `key: value`. {MINIMAL}")
    file = ResolvedSettings(SECTIONS, source, document.locations, document.problems)
    file.add(((str(key),), value, file.location((str(key),))) for key, value in document.value.items())
    arguments, problems = read_overrides(overrides)
    written = {path: location for *_, locations in arguments for path, location in locations.items()}
    command_line = ResolvedSettings(SECTIONS, SOURCE, written, problems)
    command_line.add((path, value, command_line.location(path)) for path, value, _ in arguments)
    return _validated(with_global_batch(file.override_with(command_line)), check)


def with_global_batch(resolved: ResolvedSettings) -> ResolvedSettings:
    """The global batch that other trainers write as accumulation steps, for one process."""
    accumulation = resolved.settings.pop(ACCUMULATION, None)
    if accumulation is None:
        return resolved
    micro_batch = resolved.settings.get("train.micro_batch", Train().micro_batch)
    if type(accumulation) is not int or accumulation < 1:
        location = resolved.locations[("train", "accumulation")]
        resolved.problems.append((location, f"found {shown(accumulation)}, allowed: a whole number >= 1."))
    elif type(micro_batch) is int:
        resolved.settings["train.global_batch"] = accumulation * micro_batch
        resolved.notes.append(
            f"read gradient_accumulation_steps as train.global_batch: {accumulation * micro_batch} "
            f"({micro_batch} a micro-batch x {accumulation}; it is over all processes)"
        )
    return resolved


def _validated(resolved: ResolvedSettings, check: Check) -> tuple[Recipe, list[str]]:
    """The recipe, validated section by section, so that one RecipeError lists all problems."""
    problems = [*resolved.problems]
    sections: dict[str, Any] = {}
    for name, kind in SECTIONS.items():
        values = {key.split(".")[1]: value for key, value in resolved.settings.items() if key.split(".")[0] == name}
        section, section_problems = validate(kind, values, partial(_locate, resolved, name))
        problems += section_problems
        if section is not None:
            sections[name] = section
    for key, message in conflicts_between(sections).items():
        problems.append((resolved.location(tuple(key.split("."))), message))
    raise_problems(problems)
    recipe = Recipe(**sections)
    raise_problems((resolved.location(tuple(key.split("."))), message) for key, message in check(recipe))
    return recipe, resolved.notes


def _locate(resolved: ResolvedSettings, section: str, path: Path) -> Location:
    return resolved.location((section, *path))
