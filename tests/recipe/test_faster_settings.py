"""The faster optimizer and micro-batch that a note names on a GPU: only what fits, and nothing on a CPU."""

from typing import Any

import pytest
from support.published_models import CONFIGS

from qlora.memory.planner.config_reader import shapes_of
from qlora.recipe.faster_settings import faster_settings
from qlora.recipe.planning import Machine, Planner
from qlora.recipe.recipe import Recipe, from_mapping
from qlora.utils.machine import GIB

MODEL = "Llama-3.1-8B"


def recipe_of(*overrides: str) -> Recipe:
    mapping: dict[str, Any] = {"model": {"name": MODEL}, "data": {"train": "-", "max_length": 512}}
    return from_mapping(mapping, overrides=overrides)[0]


def notes_of(gpu_bytes: int | None, *overrides: str) -> list[str]:
    recipe = recipe_of(*overrides)
    plan = Planner(recipe, shapes_of(CONFIGS[MODEL], MODEL)).plan(Machine(gpu_bytes, host_bytes=64 * GIB))
    return faster_settings(plan, recipe)


def test_a_large_gpu_takes_adamw_and_a_larger_micro_batch() -> None:
    notes = notes_of(80 * GIB)
    assert notes[0].startswith("optim.kind: adamw fits too") and notes[1].startswith("train.micro_batch: ")
    size = int(notes[1].split()[1])
    assert size > 1
    assert not any("micro_batch" in note for note in notes_of(80 * GIB, f"train.micro_batch={size}"))


def test_what_is_set_or_does_not_fit_is_not_named() -> None:
    assert notes_of(80 * GIB, "optim.kind=adamw", "train.micro_batch=16") == []
    assert notes_of(80 * GIB, "optim.kind=adamw", "train.global_batch=1") == []
    assert notes_of(None) == [] and notes_of(GIB) == []


@pytest.mark.parametrize("gib", [7, 8, 10, 12, 16, 24])
def test_a_named_setting_fits(gib: int) -> None:
    for note in notes_of(gib * GIB):
        key, value = note.split(": ", 1)
        planner = Planner(recipe_of(f"{key}={value.split()[0]}"), shapes_of(CONFIGS[MODEL], MODEL))
        assert planner.plan(Machine(gib * GIB, host_bytes=64 * GIB)).fits
