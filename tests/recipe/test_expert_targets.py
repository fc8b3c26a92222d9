"""`qlora check` of a model with experts: targets that are stacks, and ranks of experts that fit."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import AdapterError
from qlora.recipe.check_model import Structure, check_targets, structure_of
from qlora.recipe.recipe import Recipe, from_mapping


def recipe(model: Path, adapter: Mapping[str, Any]) -> Recipe:
    return from_mapping(
        {"model": {"name": str(model), "dtype": "float32"}, "adapter": adapter, "data": {"train": "x"}}
    )[0]


@pytest.fixture(scope="module")
def structure(expert_zoo: Callable[[str], Path]) -> Structure:
    return structure_of(recipe(expert_zoo("qwen3_moe"), {}))


def test_a_stack_is_one_target(structure: Structure) -> None:
    assert len(structure.stacks) == 4 and len(structure.linears) == 12
    assert "model.layers.1.mlp.experts.gate_up_proj" in structure.linears


ALLOWED: list[dict[str, Any]] = [
    {}, {"targets": ["gate_up_proj"]}, {"targets": ["q_proj"]}, {"expert_rank": 0}, {"expert_rank": 3},
    {"kind": "dora", "expert_rank": 0}, {"kind": "dora", "targets": ["q_proj"]},
]  # fmt: skip
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"targets": ["q_proj"], "expert_rank": 2}, r"expert_rank: 2 has no effect: adapter\.targets names no experts"),
    ({"targets": ["down_proj"], "expert_rank": 0}, r"'down_proj' can't be adapted: adapter\.expert_rank: 0 leaves"),
    ({"kind": "dora"}, r"dora can't adapt experts.*expert_rank: 0"),
]


@pytest.mark.parametrize("adapter", ALLOWED, ids=str)
def test_what_a_run_trains_is_no_problem(expert_zoo: Callable[[str], Path], structure: Structure, adapter: Any) -> None:
    check_targets(recipe(expert_zoo("qwen3_moe"), adapter), structure)


@pytest.mark.parametrize(("adapter", "message"), REFUSED, ids=str)
def test_what_would_stop_a_run_is_a_problem(
    expert_zoo: Callable[[str], Path], structure: Structure, adapter: Any, message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        check_targets(recipe(expert_zoo("qwen3_moe"), adapter), structure)
