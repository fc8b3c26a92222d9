"""Objectives that compare answers, under everything else: adapters, memory, dtypes, strategies, sweeps, exports."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import qlora
from support.preferences import write_pairs
from support.small_runs import adapter_tensors, metrics, recipe_of, run
from support.sweeps import Sweep

from qlora.recipe.recipe import Recipe

Zoo = Callable[..., Path]
PAIRS = 10


def recipe_for(model: Path, data: Path, output: Path, *overrides: str) -> Recipe:
    options = ("objective.kind=dpo", "train.max_steps=3", "train.micro_batch=2", "optim.learning_rate=1e-3")
    return recipe_of(model, data, output, *options, "data.eval_fraction=0.2", "data.max_length=160", *overrides)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", PAIRS)


@pytest.fixture(scope="module")
def plain(zoo: Zoo, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of LoRA with everything resident."""
    output = tmp_path_factory.mktemp("plain") / "run"
    run(recipe_for(zoo("llama"), pairs, output))
    return output


def assert_close(folder: Path, other: Path, tolerance: float) -> None:
    """Both runs have the same lines and the same adapter."""
    for event in ("train", "eval"):
        for line, expected in zip(metrics(folder, event), metrics(other, event), strict=True):
            assert line.pop("event") == expected.pop("event")
            assert line == pytest.approx(expected, rel=tolerance, abs=tolerance)
    tensors, others = adapter_tensors(folder), adapter_tensors(other)
    assert max(float((tensors[name] - others[name]).abs().max()) for name in tensors) <= tolerance


@pytest.mark.sample(of=4)
@pytest.mark.parametrize(
    "overrides",
    [("memory.weights=stream",), ("memory.recompute=all", "memory.offload_activations=true")],
    ids=["stream", "offload"],
)
def test_memory_policies_change_nothing(
    zoo: Zoo, pairs: Path, plain: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    run(recipe_for(zoo("llama"), pairs, tmp_path / "run", *overrides))
    assert_close(tmp_path / "run", plain, 1e-5)


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("kind", ["dora", "rslora"])
def test_other_adapters_start_at_the_reference_and_learn(zoo: Zoo, pairs: Path, tmp_path: Path, kind: str) -> None:
    run(recipe_for(zoo("llama"), pairs, tmp_path / "run", f"adapter.kind={kind}"))
    first, *_, last = metrics(tmp_path / "run")
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4) and first["margin"] == pytest.approx(0.0, abs=1e-5)
    assert last["loss"] < first["loss"] and last["margin"] > 0


def test_a_sweep_over_beta_trains_each_variant_as_alone(zoo: Zoo, pairs: Path, tmp_path: Path) -> None:
    options = ("objective.kind=dpo", "train.max_steps=2", "data.eval_fraction=0.2", "data.max_length=160")
    sweep = Sweep(zoo("llama"), tmp_path, *options, data=pairs)
    result = sweep.train_together("objective.beta=0.05,0.5")
    assert result.failure is None
    names = sweep.train_alone("objective.beta=0.05,0.5")
    sweep.assert_same_runs(names)
    margins = [metrics(tmp_path / "together" / name)[-1]["margin"] for name in names]
    assert margins[0] != margins[1]


def test_early_stopping_keeps_the_adapter_of_the_highest_accuracy(zoo: Zoo, pairs: Path, tmp_path: Path) -> None:
    options = ("train.eval_every=1", "train.early_stop=2", "train.early_stop_on=accuracy", "train.max_steps=12")
    result = run(recipe_for(zoo("llama"), pairs, tmp_path / "run", *options, "data.eval_fraction=0.4"))["result"]
    accuracies = [line["eval_accuracy"] for line in metrics(tmp_path / "run", "eval")]
    best = accuracies.index(max(accuracies))
    assert result["best_step"] == best and result["best_eval_accuracy"] == max(accuracies)
    assert result["steps"] == best + 2 < 12 and len(accuracies) == best + 3


def test_float16_gives_the_curve_of_float32(zoo: Zoo, pairs: Path, plain: Path, tmp_path: Path) -> None:
    run(recipe_for(zoo("llama"), pairs, tmp_path / "run", "model.dtype=float16"))
    for event, name in (("train", "loss"), ("train", "margin"), ("eval", "eval_loss")):
        values, expected = ([line[name] for line in metrics(folder, event)] for folder in (tmp_path / "run", plain))
        assert values == pytest.approx(expected, abs=1e-3)


def test_a_merged_run_is_certified_on_its_held_out_pairs(plain: Path, tmp_path: Path) -> None:
    result = qlora("export", plain, tmp_path / "merged", "--to", "merged", "--dtype", "float32", "--json").json
    assert result["agreement"]["rows"] > 0 and result["agreement"]["max_logit_difference"] < 1e-3
    assert (tmp_path / "merged" / "model.safetensors").is_file()
