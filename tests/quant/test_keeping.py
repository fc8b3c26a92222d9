"""Matrices that stay in 16 bits beside quantized ones: which a pattern names, and the choice within a budget."""

import pytest

from qlora.errors import RecipeError
from qlora.quant import Keeping, Quant, build_quantizer, quantizer_at
from qlora.quant.dense import Dense
from qlora.quant.kept_choice import MatrixError, choose_kept
from qlora.quant.nf4 import Nf4

LAYER = "model.layers.1"
PATHS = [f"{LAYER}.mlp.down_proj", f"{LAYER}.mlp.experts.up_proj.0", f"{LAYER}.mlp.experts.up_proj.11"]


def keeping(*patterns: str) -> Keeping:
    quantizer = build_quantizer(Quant(keep=patterns))
    assert isinstance(quantizer, Keeping)
    return quantizer


@pytest.mark.parametrize(
    "pattern, kept",
    [
        ("down_proj", PATHS[:1]),
        ("mlp.down_proj", PATHS[:1]),
        (PATHS[0], PATHS[:1]),
        ("proj", []),
        ("experts.up_proj", PATHS[1:]),
        ("experts.up_proj.1", []),
        ("experts.up_proj.11", PATHS[2:]),
        (r"layers\.[12]\..*", PATHS),
        (r"layers\.[23]\..*", []),
    ],
)
def test_a_pattern_names_a_matrix_or_a_stack(pattern: str, kept: list[str]) -> None:
    quantizer = keeping(pattern)
    assert [path for path in PATHS if quantizer.keeps(path)] == kept
    kinds = {path: type(quantizer_at(quantizer, path)) for path in PATHS}
    assert kinds == {path: Dense if path in kept else Nf4 for path in PATHS}
    if not kept:
        with pytest.raises(RecipeError, match=r"quant.keep: .* matches no matrix.*Known: down_proj, up_proj"):
            quantizer.refuse_unused(PATHS)
    else:
        quantizer.refuse_unused(PATHS)


def test_without_names_there_is_nothing_to_keep() -> None:
    assert build_quantizer(Quant()) == build_quantizer(Quant(keep=()))
    assert build_quantizer(Quant(kind="dense")) == Dense()


def test_the_choice_takes_the_most_cost_per_byte_that_fits() -> None:
    matrices = [
        MatrixError("large", bytes=100, error=0.1, kl=9.0, tokens=1),
        MatrixError("small", bytes=10, error=0.1, kl=2.0, tokens=1),
        MatrixError("poor", bytes=10, error=0.9, kl=0.1, tokens=1),
        MatrixError("unseen", bytes=10, error=0.0, kl=0.0, tokens=0),
    ]
    assert choose_kept(matrices, 9) == []
    assert choose_kept(matrices, 15) == ["small"]
    assert choose_kept(matrices, 25) == ["small", "poor"]
    assert choose_kept(matrices, 110) == ["large", "small"]
    assert choose_kept(matrices, 1000) == ["large", "small", "poor"]
