"""The plan of a run in float16: that of float32, with the rounded input and output of one product at a time."""

from dataclasses import replace

import pytest
from support.published_models import CONFIGS, workload

from qlora.memory.planner.breakdown import phases_of
from qlora.memory.planner.config_reader import shapes_of
from qlora.recipe.planning import Machine, dtype_bytes, dtype_on


def test_products_in_float16_take_rounded_copies_and_nothing_else() -> None:
    float32 = workload(shapes_of(CONFIGS["Llama-3.1-8B"], "model"), dtype_bytes=4, device="cuda", max_length=2048)
    float16, tokens = replace(float32, float16=True), 2048
    copies = 2 * tokens * (4096 + 14336)  # of an MLP's matrix, which is the largest too
    for phase, components in phases_of(float16).items():
        expected = phases_of(float32)[phase]
        buffer = "dequantisation_buffer" if phase in ("backward", "evaluation") else None
        other = {name: size for name, size in components.items() if name not in (buffer, "fragmentation_reserve")}
        assert other == {name: expected[name] for name in other}
        if buffer:
            assert components[buffer] - expected[buffer] == copies


@pytest.mark.parametrize(
    ("setting", "base", "bfloat16", "expected"),
    [
        ("auto", "bfloat16", True, "bfloat16"),
        ("auto", "float16", False, "float16"),
        ("auto", "float32", False, "float32"),
        ("auto", None, True, "float32"),
        ("float16", "bfloat16", True, "float16"),
    ],
)
def test_the_dtype_follows_the_machine(setting: str, base: str | None, bfloat16: bool, expected: str) -> None:
    assert dtype_on(Machine(2**30, bfloat16=bfloat16), setting, base) == expected
    assert dtype_bytes(expected) == (2 if expected == "bfloat16" else 4)
