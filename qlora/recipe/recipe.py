"""A recipe: the sections of the rooms put together, and the rules between them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path as FilePath
from typing import Annotated, Any

from qlora.adapters import Adapter
from qlora.config import (
    REQUIRED,
    Document,
    Path,
    Place,
    Section,
    Short,
    complain,
    parse,
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
from qlora.training import Optim, Train

LEAST = "The least it holds: `model: meta-llama/Llama-3.1-8B` and `data: {train: data/train.jsonl}`."


class Recipe(Section):
    """Everything that a run is told."""

    model: Annotated[Model, Short("name")] = setting(REQUIRED, "the base model; a text is short for {name: text}")
    quant: Quant = setting(Quant(), "how the frozen base is stored")
    adapter: Adapter = setting(Adapter(), "the small trainable layers")
    data: Data = setting(REQUIRED, "what is learnt from")
    optim: Optim = setting(Optim(), "how the trainable weights move")
    train: Train = setting(Train(), "how long, how much at a time, and what is kept")
    memory: Memory = setting(Memory(), "what may be used, and how it is saved")
    distributed: Distributed = setting(Distributed(), "how the processes share the work")

    def clashes(self) -> Mapping[str, str]:
        """What is wrong between sections."""
        return between({name: getattr(self, name) for name in SECTIONS})


SECTIONS: Mapping[str, type[Section]] = {
    "model": Model,
    "quant": Quant,
    "adapter": Adapter,
    "data": Data,
    "optim": Optim,
    "train": Train,
    "memory": Memory,
    "distributed": Distributed,
}


def read(path: str | PathLike[str], overrides: Sequence[str] = ()) -> tuple[Recipe, list[str]]:
    """The recipe in a file under the overrides, and a note for each alias that was read.

    RecipeError with a line for every problem, each at its file:line or key.
    """
    where = str(path)
    document = parse(read_text(where), where)
    return _recipe(document, where, overrides)


def from_mapping(
    mapping: Mapping[str, Any], where: str = "recipe", overrides: Sequence[str] = ()
) -> tuple[Recipe, list[str]]:
    """As `read`, from plain values: `from_mapping({"model": "...", "data": {"train": "rows.jsonl"}})`."""
    return _recipe(Document(mapping), where, overrides)


def dump(recipe: Recipe) -> str:
    """YAML with every setting written out; reads back to the same recipe."""
    return write(recipe.model_dump())


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe: types, ranges, words, defaults and what each setting does."""
    found = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": "qlora recipe"}


def recipes_folder() -> FilePath:
    """The folder of the recipes that come with qlora: inside the package when installed, beside it in a checkout."""
    package = FilePath(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def _recipe(document: Document, where: str, overrides: Sequence[str]) -> tuple[Recipe, list[str]]:
    if document.value is None:
        raise RecipeError(f"{where}: is empty. {LEAST}")
    if not isinstance(document.value, Mapping):
        raise RecipeError(f"{where}: found {shown(document.value)}, allowed: lines of `key: value`. {LEAST}")
    file = ResolvedSettings(SECTIONS, where, document.places, document.problems)
    file.take(((str(key),), value, file.place((str(key),))) for key, value in document.value.items())
    given, unread = read_overrides(overrides)
    written = {at: place for *_, inside in given for at, place in inside.items()}
    line = ResolvedSettings(SECTIONS, SOURCE, written, unread)
    line.take((path, value, line.place(path)) for path, value, _ in given)
    return _checked(accumulated(line.over(file)))


def accumulated(said: ResolvedSettings) -> ResolvedSettings:
    """The global batch that other trainers write as accumulation, for one process."""
    accumulation = said.settings.pop(ACCUMULATION, None)
    if accumulation is None:
        return said
    micro_batch = said.settings.get("train.micro_batch", Train().micro_batch)
    if type(accumulation) is not int or accumulation < 1:
        place = said.places[("train", "accumulation")]
        said.problems.append((place, f"found {shown(accumulation)}, allowed: a whole number >= 1."))
    elif type(micro_batch) is int:
        said.settings["train.global_batch"] = accumulation * micro_batch
        said.notes.append(
            f"read gradient_accumulation_steps as train.global_batch: {accumulation * micro_batch} "
            f"({micro_batch} a micro-batch x {accumulation}; it is over all processes)"
        )
    return said


def _checked(said: ResolvedSettings) -> tuple[Recipe, list[str]]:
    """The recipe, section by section, so that one message names all problems. RecipeError if there are any."""
    problems = [*said.problems]
    good: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        value = {key.split(".")[1]: each for key, each in said.settings.items() if key.split(".")[0] == name}
        found, wrong = validate(section, value, partial(_inside, said, name))
        problems += wrong
        good |= {name: found} if found is not None else {}
    for key, text in between(good).items():
        problems.append((said.place(tuple(key.split("."))), text))
    complain(problems)
    return Recipe(**good), said.notes


def _inside(said: ResolvedSettings, section: str, path: Path) -> Place:
    return said.place((section, *path))


def between(sections: Mapping[str, Any]) -> dict[str, str]:
    """What the rules say about the sections that are there."""
    ready = [(rule, [sections[name] for name in needs]) for needs, rule in RULES if sections.keys() >= set(needs)]
    return {key: text for rule, needed in ready for key, text in rule(*needed).items()}


def _full_is_dense(adapter: Adapter, quant: Quant) -> dict[str, str]:
    if adapter.kind != "full" or quant.kind == "dense":
        return {}
    return {"adapter.kind": f"full trains every weight; stored as {quant.kind} they can't move. Set quant.kind: dense."}


def _loftq_is_quantised(adapter: Adapter, quant: Quant) -> dict[str, str]:
    if adapter.kind == "full" or adapter.init != "loftq" or quant.kind != "dense":
        return {}
    return {"adapter.init": "loftq starts from the error of quantising, and quant.kind dense has none. Remove it."}


def _loraplus_has_b(adapter: Adapter, optim: Optim) -> dict[str, str]:
    if adapter.kind != "full" or optim.loraplus_ratio is None:
        return {}
    return {"optim.loraplus_ratio": "has no effect: adapter.kind full has no A and B. Remove it."}


def _full_stays(adapter: Adapter, memory: Memory) -> dict[str, str]:
    if adapter.kind != "full" or memory.weights != "stream":
        return {}
    return {"memory.weights": "stream: adapter.kind full moves every weight, and only frozen ones stream. Remove it."}


def _embedding_stays(adapter: Adapter, memory: Memory) -> dict[str, str]:
    key = next((key for key in ("save_modules", "tokens", "new_tokens") if getattr(adapter, key)), None)
    if key is None or memory.weights != "stream":
        return {}
    return {"memory.weights": f"stream has no place for what adapter.{key} trains. Remove one of the two."}


def _evaluates(train: Train, data: Data) -> dict[str, str]:
    if data.eval is not None or data.eval_fraction > 0:
        return {}
    keys = [key for key in ("eval_every", "early_stop") if getattr(train, key) is not None]
    why = "no rows are held out (data.eval null, data.eval_fraction 0)"
    return {f"train.{key}": f"has no effect: {why}. Remove it, or hold rows out." for key in keys}


def _stops_between_evaluations(train: Train) -> dict[str, str]:
    if train.early_stop is None or train.eval_every is not None:
        return {}
    return {"train.early_stop": "has no effect: there are no evaluations on the way. Set train.eval_every too."}


def _compiled_stays(train: Train, memory: Memory) -> dict[str, str]:
    """A compiled layer is one graph, with no place for copies that come and go."""
    asked = {"memory.weights": memory.weights == "stream", "memory.offload_activations": memory.offload_activations}
    why = "compiled layers neither stream nor park. Remove it, or train.compile."
    return {key: why for key, wanted in asked.items() if train.compile and wanted is True}


RULES: tuple[tuple[tuple[str, ...], Callable[..., dict[str, str]]], ...] = (
    (("adapter", "quant"), _full_is_dense),
    (("adapter", "quant"), _loftq_is_quantised),
    (("adapter", "optim"), _loraplus_has_b),
    (("adapter", "memory"), _full_stays),
    (("adapter", "memory"), _embedding_stays),
    (("train",), _stops_between_evaluations),
    (("train", "data"), _evaluates),
    (("train", "memory"), _compiled_stays),
)
