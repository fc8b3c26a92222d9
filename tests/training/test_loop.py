"""The training loop: non-finite steps are skipped, evaluations are on time, the best checkpoint is kept."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.small_runs import adapter_tensors, differing_tensors, metrics, recipe_of, run, write_records
from support.stopped_runs import RECORDS, Zoo, non_finite_gradient
from support.training_hooks import before_first_forward

from qlora.errors import QloraError
from qlora.recipe.recipe import Recipe
from qlora.training.checkpoint import OPTIMIZER
from qlora.training.loss import TokenLoss


def one_backward_per_step(zoo: Zoo, tmp_path: Path, *overrides: str) -> Recipe:
    data = write_records(tmp_path / "records.jsonl", RECORDS)
    options = ("train.micro_batch=4", "train.save_every=1", "train.keep=99", *overrides)
    return recipe_of(zoo("llama"), data, tmp_path / "run", *options)


def all_finite(folder: Path) -> Iterator[bool]:
    for file in folder.rglob("*.safetensors"):
        for value in load_file(file).values():
            yield bool(torch.isfinite(value.float()).all())


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_step_is_skipped_and_changes_nothing(zoo: Zoo, value: float, tmp_path: Path) -> None:
    with non_finite_gradient([3, 5], value):
        manifest = run(one_backward_per_step(zoo, tmp_path))
    checkpoints = [tmp_path / "run" / f"checkpoint-{step:06d}" for step in range(1, 7)]
    assert manifest["result"]["skipped_steps"] == 2
    for before, after in ((1, 2), (3, 4)):
        assert differing_tensors(checkpoints[before - 1], checkpoints[after - 1]) != [], (before, after)
    for step in (3, 5):
        before, after = checkpoints[step - 2], checkpoints[step - 1]
        assert differing_tensors(before, after) == []
        assert (before / OPTIMIZER).read_bytes() == (after / OPTIMIZER).read_bytes()
        assert metrics(tmp_path / "run")[step - 1]["loss"] is None
    assert differing_tensors(checkpoints[3], checkpoints[5]) != [] and all(all_finite(tmp_path / "run"))


def test_three_non_finite_steps_in_a_row_end_the_run_and_are_not_saved(zoo: Zoo, tmp_path: Path) -> None:
    expected = r"3 steps in a row.*records\.jsonl:"
    with non_finite_gradient([2, 4, 5, 6]), pytest.raises(QloraError, match=expected) as caught:
        run(one_backward_per_step(zoo, tmp_path))
    assert caught.value.exit_code == 1
    assert all(all_finite(tmp_path / "run")) and not (tmp_path / "run" / "run.json").exists()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    last = adapter_tensors(max((tmp_path / "run").glob("checkpoint-*")))
    assert all(bool(torch.isfinite(value).all()) for value in last.values())


# ---- evaluations


def test_evaluations_are_at_the_start_every_eval_every_and_at_the_end(zoo: Zoo, tmp_path: Path) -> None:
    recipe = one_backward_per_step(zoo, tmp_path, "data.eval_fraction=0.2", "train.eval_every=4")
    result = run(recipe)["result"]
    lines = metrics(tmp_path / "run", "eval")
    assert [line["step"] for line in lines] == [0, 4, 6]
    assert result["eval_loss_before"] == lines[0]["eval_loss"] and result["eval_loss"] == lines[-1]["eval_loss"]
    assert result["best_eval_loss"] == min(line["eval_loss"] for line in lines)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_does_not_improve_stops_early_and_is_finished(zoo: Zoo, tmp_path: Path) -> None:
    options = ("data.eval_fraction=0.2", "train.eval_every=1", "train.early_stop=2", "train.max_steps=40")
    recipe = one_backward_per_step(zoo, tmp_path, *options, "optim.learning_rate=0.3")
    steps = run(recipe)["result"]["steps"]
    losses = [line["eval_loss"] for line in metrics(tmp_path / "run", "eval")]
    assert steps < 40 and len(losses) == steps + 1
    assert min(losses[-2:]) >= min(losses[:-2]) and losses.index(min(losses)) == len(losses) - 3
    assert run(recipe)["result"]["steps"] == steps


def test_without_held_out_records_there_is_no_evaluation(zoo: Zoo, tmp_path: Path) -> None:
    result = run(one_backward_per_step(zoo, tmp_path))["result"]
    assert result["eval_loss"] is None and metrics(tmp_path / "run", "eval") == []


def test_the_best_and_the_newest_checkpoints_are_kept(zoo: Zoo, tmp_path: Path) -> None:
    data = write_records(tmp_path / "records.jsonl", RECORDS)
    options = (
        "data.eval_fraction=0.2",
        "train.eval_every=1",
        "train.save_every=1",
        "train.keep=2",
        "train.max_steps=6",
        "data.train_on=all",
    )
    run(recipe_of(zoo("llama"), data, tmp_path / "run", *options, "optim.learning_rate=0.1"))
    best = min(metrics(tmp_path / "run", "eval")[1:], key=lambda line: line["eval_loss"])["step"]
    steps = {int(folder.name[-6:]) for folder in (tmp_path / "run").glob("checkpoint-*")}
    assert {5, 6} <= steps <= {5, 6, best}


def test_a_non_finite_held_out_loss_causes_no_traceback(zoo: Zoo, tmp_path: Path) -> None:
    def make_eval_loss_nan(model: TokenLoss) -> None:
        model.register_forward_hook(lambda module, inputs, loss: loss if module.training else loss * float("nan"))

    recipe = one_backward_per_step(zoo, tmp_path, "data.eval_fraction=0.2", "train.eval_every=2")
    with before_first_forward(make_eval_loss_nan):
        try:
            assert run(recipe)["result"]["eval_loss"] is None
        except QloraError as error:
            assert "finite" in str(error)
