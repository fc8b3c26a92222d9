"""Settings that all variants of a sweep share: base model, quantization, memory and processes. Others may differ."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qlora.errors import InputError, QloraError
from qlora.recipe.recipe import Recipe

SECTIONS = ("model", "quant", "memory", "distributed")
KEYS = ("train.compile", "train.deterministic")
TRACKERS = {"tensorboard"}  # trackers that support several runs at once in a process


def refuse_incompatible(recipes: Mapping[str, Recipe]) -> None:
    """InputError, naming variant and key, if the recipes can't share a base model or two of them are the same."""
    (first_name, first_recipe), *others = recipes.items()
    for name, recipe in recipes.items():
        _refuse_unsupported(name, recipe)
    shared = _shared_settings(first_recipe)
    for name, recipe in others:
        for key, value in _shared_settings(recipe).items():
            if value != shared[key]:
                raise InputError(
                    f"{key}: {value!r} in {name}, {shared[key]!r} in {first_name}. All variants train on one base "
                    f"model, so {', '.join(f'{section}.*' for section in SECTIONS)}, {' and '.join(KEYS)} must be the "
                    "same for all. Start a separate sweep for each value."
                )
    names: dict[str, str] = {}
    for name, recipe in recipes.items():
        other = names.setdefault(_without_output(recipe), name)
        if other != name:
            raise InputError(f"{other} and {name} are the same run: every setting is the same. Leave one of them out.")


def _refuse_unsupported(name: str, recipe: Recipe) -> None:
    """InputError for a setting that a sweep does not support."""
    train = recipe.train
    trained = recipe.adapter.trains_base_weights()
    if trained:
        raise InputError(
            f"{trained} trains weights of the base model ({name}), which the variants share. Leave it out."
        )
    if recipe.distributed.kind == "fsdp":
        raise InputError(
            "distributed.kind: fsdp shards a run over several processes; a sweep is one process. Use auto."
        )
    if train.compile:
        raise InputError(
            "train.compile: a compiled layer has one adapter, and a sweep switches it at every step. Leave it out."
        )
    if train.resume not in ("auto", "never"):
        raise InputError(
            f"train.resume: {train.resume} is a checkpoint of one run. Use auto: each variant resumes from its own."
        )
    tracker = next((tracker for tracker in train.report_to if tracker not in TRACKERS), None)
    if tracker:
        raise InputError(
            f"train.report_to: {tracker} supports one run per process, and would report all variants as one. "
            "Leave it out, or use tensorboard."
        )


def _shared_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that must be the same for all variants, by key."""
    values = recipe.model_dump(mode="json")
    settings = {f"{section}.{key}": value for section in SECTIONS for key, value in values[section].items()}
    return settings | {key: values["train"][key.removeprefix("train.")] for key in KEYS}


def _without_output(recipe: Recipe) -> str:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"output": "-"})}).model_dump_json()


@contextmanager
def name_in_errors(name: str) -> Iterator[None]:
    """Prefix errors raised inside the block with the variant's name."""
    try:
        yield
    except QloraError as error:
        raise type(error)(f"{name}: {error}") from error
