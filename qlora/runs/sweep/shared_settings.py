"""What all variants of a sweep have in common: the base, how it is stored and where; the rest is each one's own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qlora.errors import InputError, QloraError
from qlora.recipe.recipe import Recipe

SECTIONS = ("model", "quant", "memory", "distributed")
KEYS = ("train.compile", "train.deterministic")
ONE_A_PROCESS = "all of its runs at once would be one to it. Leave it out, or use tensorboard"
TRACKERS = {"tensorboard"}  # that can follow several runs of one process


def refuse_apart(recipes: Mapping[str, Recipe]) -> None:
    """InputError, naming variant and key, unless the recipes can train on one base and none is another's twin."""
    (first, leader), *others = recipes.items()
    for name, recipe in recipes.items():
        _refuse_alone(name, recipe)
    shared = _shared(leader)
    for name, recipe in others:
        for key, value in _shared(recipe).items():
            if value != shared[key]:
                raise InputError(
                    f"{key}: {value!r} in {name}, {shared[key]!r} in {first}. All variants train on one base, so "
                    f"{', '.join(f'{each}.*' for each in SECTIONS)}, {' and '.join(KEYS)} are the same for all. "
                    "Make it a sweep of its own."
                )
    seen: dict[str, str] = {}
    for name, recipe in recipes.items():
        twin = seen.setdefault(_without_output(recipe), name)
        if twin != name:
            raise InputError(f"{twin} and {name} are the same run: every setting is the same. Leave one of them out.")


def _refuse_alone(name: str, recipe: Recipe) -> None:
    """InputError for a setting that no run of a sweep can have."""
    train = recipe.train
    trained = recipe.adapter.of_the_base()
    if trained:
        raise InputError(f"{trained} trains the base itself ({name}), which the variants share. Leave it out.")
    if recipe.distributed.kind == "fsdp":
        raise InputError("distributed.kind: fsdp shares one run out over cards; a sweep is one process. Use auto.")
    if train.compile:
        raise InputError(
            "train.compile: a compiled layer holds one adapter, and a sweep changes it at every step. Leave it out."
        )
    if train.resume not in ("auto", "never"):
        raise InputError(f"train.resume: {train.resume} is one run's. Use auto: each variant resumes from its own.")
    odd = next((each for each in train.report_to if each not in TRACKERS), None)
    if odd:
        raise InputError(f"train.report_to: {odd} follows one run a process; {ONE_A_PROCESS}.")


def _shared(recipe: Recipe) -> dict[str, Any]:
    """The settings that are the same for all, by key."""
    said = recipe.model_dump(mode="json")
    found = {f"{name}.{key}": value for name in SECTIONS for key, value in said[name].items()}
    return found | {key: said["train"][key.removeprefix("train.")] for key in KEYS}


def _without_output(recipe: Recipe) -> str:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"output": "-"})}).model_dump_json()


@contextmanager
def named(name: str) -> Iterator[None]:
    """Let an error inside the block say which variant's it is."""
    try:
        yield
    except QloraError as error:
        raise type(error)(f"{name}: {error}") from error
