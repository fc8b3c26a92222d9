"""model.dtype: float16: curves as in float32, matrices that overflow are found, resuming is exact, splits agree."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_runs import differing_tensors, metrics, recipe_of, run, write_records
from support.stopped_runs import RECORDS, Zoo, assert_same_run, non_finite_gradient, signal_in_step
from support.tiny_models import save_model
from support.training_hooks import before_forward

from qlora.demo.walkthrough import DEMO
from qlora.errors import QloraError, Stopped
from qlora.model.float16_products import LARGEST, float32_products
from qlora.model.linear_layers import frozen_linears
from qlora.recipe.recipe import Recipe, from_mapping
from qlora.recipe.recipe import read as read_recipe
from qlora.runs.evaluate import evaluate_run
from qlora.runs.load_run import load_run
from qlora.training.checkpoint import read
from qlora.training.loss import TokenLoss

TOLERANCE = 1e-3  # of a loss, between float16 and float32
PLANTED = "model.layers.1.mlp.down_proj"
OPTIONS = (
    "train.max_steps=3",
    "optim.learning_rate=1e-3",
    "data.packing=true",
    "data.eval_fraction=0.2",
    "data.train_on=all",
)  # train_on all: no prompts to answer, which would cost more than the steps


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("records") / "records.jsonl", RECORDS)


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with one matrix whose outputs exceed float16; the final norm brings them back."""
    folder = save_model(tmp_path_factory.mktemp("base"), "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{PLANTED}.weight"] *= 2.0**17
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def losses(base: Path, data: Path, output: Path, dtype: str, *overrides: str) -> tuple[list[float], Any]:
    """Losses of every step and evaluation, and run.json."""
    manifest = run(recipe_of(base, data, output, *OPTIONS, f"model.dtype={dtype}", *overrides))
    curve = [line["loss"] for line in metrics(output)] + [line["eval_loss"] for line in metrics(output, "eval")]
    return curve, manifest


def largest_difference(first: Sequence[float], second: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


@pytest.mark.sample(of=4)
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama-tied-bias", ("adapter.kind=dora", "adapter.dropout=0.1", "memory.recompute=1")),
        ("gemma3", ("memory.recompute=all", "adapter.save_modules=[lm_head]")),
    ],
)
def test_the_curve_is_that_of_float32(
    zoo: Zoo, data: Path, family: str, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    expected, _ = losses(zoo(family), data, tmp_path / "float32", "float32", *overrides)
    curve, manifest = losses(zoo(family), data, tmp_path / "float16", "float16", *overrides)
    assert 0 < largest_difference(curve, expected) <= TOLERANCE
    assert manifest["base"]["dtype"] == "float16" and manifest["float16"]["in_float32"] == {}
    assert abs(manifest["float16"]["float16_loss"] - manifest["float16"]["float32_loss"]) <= TOLERANCE


def test_a_matrix_that_overflows_computes_in_float32(overflowing: Path, data: Path, tmp_path: Path) -> None:
    expected, _ = losses(overflowing, data, tmp_path / "float32", "float32")
    curve, manifest = losses(overflowing, data, tmp_path / "float16", "float16")
    assert [*manifest["float16"]["in_float32"]] == [PLANTED]
    assert manifest["float16"]["in_float32"][PLANTED] > LARGEST
    assert largest_difference(curve, expected) <= TOLERANCE


def test_evaluation_computes_as_the_run_did(overflowing: Path, data: Path, tmp_path: Path) -> None:
    _, manifest = losses(overflowing, data, tmp_path / "run", "float16", "train.save_every=3")
    loaded = load_run(str(tmp_path / "run"))
    in_float32 = [path for path, layer in frozen_linears(loaded.base.model).items() if layer.product_dtype is None]
    assert in_float32 == [PLANTED]
    assert evaluate_run(loaded, None, "loss")["loss"] == manifest["result"]["eval_loss"]
    with float32_products(loaded.base.model):
        assert evaluate_run(loaded, None, "loss")["loss"] != manifest["result"]["eval_loss"]
    lines: list[str] = []  # a checkpoint has no run.json: a general text is measured
    checkpoint = load_run(str(tmp_path / "run" / "checkpoint-000003"), log=lines.append)
    assert frozen_linears(checkpoint.base.model)[PLANTED].product_dtype is None
    assert any(PLANTED in line and "1 of 14 matrices compute in float32" in line for line in lines)


def test_a_later_overflow_ends_the_run_and_is_named(zoo: Zoo, data: Path, tmp_path: Path) -> None:
    """The inputs of one matrix grow by 10^7 after the start, by the norm before it."""

    def enlarge(loss: TokenLoss) -> None:
        if loss.training:
            loss.model.model.layers[1].input_layernorm.weight.data.fill_(1e7)  # type: ignore[union-attr, index]

    with before_forward(enlarge), pytest.raises(QloraError, match="3 steps in a row") as caught:
        losses(zoo("llama"), data, tmp_path / "run", "float16")
    assert "first at model.layers.1.self_attn.q_proj, whose values exceed float16" in str(caught.value)


def test_resuming_is_exact_with_the_scale(zoo: Zoo, data: Path, tmp_path: Path) -> None:
    """Steps 1 and 4 overflow; the run is stopped in its fourth update, step 6 of 8."""

    def recipe(name: str) -> Recipe:
        options = ("model.dtype=float16", "train.save_every=1", "train.micro_batch=4", "adapter.dropout=0.1")
        return recipe_of(zoo("llama"), data, tmp_path / name, *options, "train.max_steps=8", "data.train_on=all")

    with non_finite_gradient([1, 4], float("inf")):
        run(recipe("uninterrupted"))
    with non_finite_gradient([1, 4], float("inf")), signal_in_step(4), pytest.raises(Stopped):
        run(recipe("stopped"))
    position = read(max((tmp_path / "stopped").glob("checkpoint-*"))).position
    assert (position.step, position.loss_scale, position.finite_steps) == (6, 2.0**14, 2)
    run(recipe("stopped"))
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "stopped")


def test_any_split_gives_the_same_curve(zoo: Zoo, data: Path, tmp_path: Path) -> None:
    curves = [
        losses(zoo("llama"), data, tmp_path / str(size), "float16", f"train.micro_batch={size}")[0] for size in (1, 4)
    ]
    assert largest_difference(*curves) <= TOLERANCE


def test_offloaded_recomputed_and_kept_layers_give_the_same_bits(zoo: Zoo, data: Path, tmp_path: Path) -> None:
    variants = (
        ("memory.recompute=none",), ("memory.recompute=all", "memory.offload_activations=true"),
        ("memory.weights=stream",),
    )  # fmt: skip
    folders = [tmp_path / str(number) for number in range(len(variants))]
    for folder, options in zip(folders, variants, strict=True):
        losses(zoo("llama"), data, folder, "float16", *options)
    assert [differing_tensors(folders[0], folder) for folder in folders[1:]] == [[]] * 2


def test_products_alone_are_in_float16(zoo: Zoo, data: Path, tmp_path: Path) -> None:
    """Every tensor that a module takes or returns is float32."""
    run(recipe_of(zoo("llama"), data, tmp_path / "run", *OPTIONS, "model.dtype=float16"))
    model = load_run(str(tmp_path / "run")).base.model
    dtypes: set[torch.dtype] = set()

    def record(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [value for value in (*inputs, output) if isinstance(value, torch.Tensor)]
        dtypes.update(value.dtype for value in tensors if value.is_floating_point())

    for module in model.modules():
        module.register_forward_hook(record)
    model(input_ids=torch.tensor([[5, 6, 7]]))
    assert dtypes == {torch.float32}
    assert {layer.product_dtype for layer in frozen_linears(model).values()} == {torch.float16}


def test_full_fine_tuning_has_no_float16() -> None:
    sections = {"model": {"name": "m", "dtype": "float16"}, "data": {"train": "records.jsonl"}}
    full = {"adapter": {"kind": "full"}, "quant": {"kind": "dense"}}
    with pytest.raises(QloraError, match="float16 is for the products of frozen matrices"):
        from_mapping({**sections, **full})


@pytest.mark.slow
def test_the_curve_of_the_demo_is_that_of_float32(tmp_path: Path) -> None:
    """Evaluations, and the mean over the 120 steps. The worst step differs by 0.002 where the loss falls fastest."""
    curves = {}
    for dtype in ("float32", "float16"):
        sources = (f"data.train={DEMO / 'data' / 'train.jsonl'}", f"data.eval={DEMO / 'data' / 'eval.jsonl'}")
        options = (f"model.name={DEMO / 'base'}", f"model.dtype={dtype}", f"train.output={tmp_path / dtype}", *sources)
        run(read_recipe(DEMO / "recipe.yaml", options)[0])
        curves[dtype] = metrics(tmp_path / dtype), metrics(tmp_path / dtype, "eval")
    steps, evaluations = zip(*curves.values(), strict=True)
    differences = [abs(line["loss"] - other["loss"]) for line, other in zip(*steps, strict=True)]
    assert len(differences) == 120 and sum(differences) / len(differences) <= TOLERANCE and max(differences) <= 5e-3
    assert all(abs(a["eval_loss"] - b["eval_loss"]) <= TOLERANCE for a, b in zip(*evaluations, strict=True))
