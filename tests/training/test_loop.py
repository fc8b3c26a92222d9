"""What the loop itself promises: nothing that is not finite is kept, evaluations come when asked, the best stays."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.small_runs import adapter_tensors, differing, metrics, recipe_of, run, write_rows
from support.stopped_runs import ROWS, Zoo, poisoned

from qlora.errors import QloraError
from qlora.recipe.recipe import Recipe
from qlora.runs import train as walk
from qlora.training.checkpoint import OPTIMIZER


def one_backward_a_step(zoo: Zoo, tmp_path: Path, *overrides: str) -> Recipe:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    options = ("train.micro_batch=4", "train.save_every=1", "train.keep=99", *overrides)
    return recipe_of(zoo("llama"), data, tmp_path / "run", *options)


def all_finite(folder: Path) -> Iterator[bool]:
    for file in folder.rglob("*.safetensors"):
        for value in load_file(file).values():
            yield bool(torch.isfinite(value.float()).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_and_changes_nothing(zoo: Zoo, value: float, tmp_path: Path) -> None:
    with poisoned([3, 5], value):
        manifest = run(one_backward_a_step(zoo, tmp_path))
    at = [tmp_path / "run" / f"checkpoint-{step:06d}" for step in range(1, 7)]
    assert manifest["result"]["skipped_steps"] == 2
    for before, after, moved in ((1, 2, False), (2, 3, True), (3, 4, False), (4, 5, True)):
        assert differing(at[before - 1], at[after - 1]) != [] or moved, (before, after)
    for skipped in (3, 5):
        assert differing(at[skipped - 2], at[skipped - 1]) == []
        assert (at[skipped - 2] / OPTIMIZER).read_bytes() == (at[skipped - 1] / OPTIMIZER).read_bytes()
        assert metrics(tmp_path / "run")[skipped - 1]["loss"] is None
    assert differing(at[3], at[5]) != [] and all(all_finite(tmp_path / "run"))


def test_three_in_a_row_end_the_run_and_nothing_of_them_is_written(zoo: Zoo, tmp_path: Path) -> None:
    with poisoned([2, 4, 5, 6]), pytest.raises(QloraError, match=r"3 steps in a row.*rows\.jsonl:") as caught:
        run(one_backward_a_step(zoo, tmp_path))
    assert caught.value.exit_code == 1
    assert all(all_finite(tmp_path / "run")) and not (tmp_path / "run" / "run.json").exists()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    last = adapter_tensors(max((tmp_path / "run").glob("checkpoint-*")))
    assert all(bool(torch.isfinite(value).all()) for value in last.values())


# ---- evaluations


def test_evaluations_are_at_the_start_at_the_end_and_in_between_as_asked(zoo: Zoo, tmp_path: Path) -> None:
    recipe = one_backward_a_step(zoo, tmp_path, "data.eval_fraction=0.2", "train.eval_every=4")
    result = run(recipe)["result"]
    lines = metrics(tmp_path / "run", "eval")
    assert [line["step"] for line in lines] == [0, 4, 6]
    assert result["eval_loss_before"] == lines[0]["eval_loss"] and result["eval_loss"] == lines[-1]["eval_loss"]
    assert result["best_eval_loss"] == min(line["eval_loss"] for line in lines)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_gets_no_better_ends_early_and_stays_ended(zoo: Zoo, tmp_path: Path) -> None:
    options = ("data.eval_fraction=0.2", "train.eval_every=1", "train.early_stop=2", "train.max_steps=40")
    recipe = one_backward_a_step(zoo, tmp_path, *options, "optim.learning_rate=0.3")
    steps = run(recipe)["result"]["steps"]
    losses = [line["eval_loss"] for line in metrics(tmp_path / "run", "eval")]
    assert steps < 40 and len(losses) == steps + 1
    assert min(losses[-2:]) >= min(losses[:-2]) and losses.index(min(losses)) == len(losses) - 3
    assert run(recipe)["result"]["steps"] == steps


def test_no_held_out_rows_no_evaluation(zoo: Zoo, tmp_path: Path) -> None:
    result = run(one_backward_a_step(zoo, tmp_path))["result"]
    assert result["eval_loss"] is None and metrics(tmp_path / "run", "eval") == []


def test_the_best_and_the_newest_checkpoints_stay(zoo: Zoo, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    options = (
        "data.eval_fraction=0.2",
        "train.eval_every=1",
        "train.save_every=1",
        "train.keep=2",
        "train.max_steps=9",
    )
    run(recipe_of(zoo("llama"), data, tmp_path / "run", *options, "optim.learning_rate=0.1"))
    best = min(metrics(tmp_path / "run", "eval")[1:], key=lambda line: line["eval_loss"])["step"]
    found = {int(folder.name[-6:]) for folder in (tmp_path / "run").glob("checkpoint-*")}
    assert {8, 9} <= found <= {8, 9, best}


def test_a_held_out_loss_that_is_not_finite_ends_in_no_stack_trace(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assemble = walk.assemble

    def assembled(*arguments: Any) -> Any:
        job = assemble(*arguments)
        job.model.register_forward_hook(lambda model, given, loss: loss if model.training else loss * float("nan"))
        return job

    monkeypatch.setattr(walk, "assemble", assembled)
    recipe = one_backward_a_step(zoo, tmp_path, "data.eval_fraction=0.2", "train.eval_every=2")
    try:
        assert run(recipe)["result"]["eval_loss"] is None
    except QloraError as error:
        assert "finite" in str(error)
