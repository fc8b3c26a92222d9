"""A run that was stopped and went on is the run that never stopped: no bit, no line of the losses differs."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.small_runs import differing, metrics, run, write_rows
from support.stopped_runs import COMBINATIONS, ROWS, STEPS, Session, Zoo, same_run, stop_after

from qlora.errors import InputError, Stopped
from qlora.training.checkpoint import OPTIMIZER


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize("step", [1, 3, 5])
@pytest.mark.parametrize("kind", COMBINATIONS)
def test_going_on_from_a_checkpoint_is_never_having_stopped(
    sessions: Callable[[str], Session], kind: str, step: int, tmp_path: Path
) -> None:
    session = sessions(kind)
    moments = load_file(session.folder / "whole" / "checkpoint-000006" / OPTIMIZER)
    assert any(value.dtype == torch.uint8 for value in moments.values()) == kind.endswith("8bit")
    output = session.stopped_at(step, tmp_path / "run")
    run(session.recipe(output))
    same_run(session.folder / "whole", output)


@pytest.mark.xdist_group("resume")
def test_running_twice_is_the_same_run(sessions: Callable[[str], Session], tmp_path: Path) -> None:
    session = sessions("adamw")
    run(session.recipe(tmp_path / "run"))
    same_run(session.folder / "whole", tmp_path / "run")


@pytest.mark.xdist_group("resume")
def test_a_finished_run_started_again_keeps_its_result(sessions: Callable[[str], Session], tmp_path: Path) -> None:
    session = sessions("paged_adamw_8bit")
    output = session.stopped_at(STEPS, tmp_path / "run")
    run(session.recipe(output))
    same_run(session.folder / "whole", output)


@pytest.mark.xdist_group("resume")
def test_a_named_checkpoint_is_resumed_from_anywhere(sessions: Callable[[str], Session], tmp_path: Path) -> None:
    session = sessions("adamw")
    checkpoint = session.folder / "whole" / "checkpoint-000002"
    run(session.recipe(tmp_path / "run", f"train.resume={checkpoint}"))
    assert differing(session.folder / "whole", tmp_path / "run") == []
    with pytest.raises(InputError, match="manifest"):
        run(session.recipe(tmp_path / "other", f"train.resume={tmp_path / 'nothing'}"))


@pytest.mark.xdist_group("resume")
def test_a_loss_line_over_several_steps_is_the_same_after_a_crash(
    sessions: Callable[[str], Session], tmp_path: Path
) -> None:
    session, options = sessions("adamw"), ("train.log_every=3", "train.save_every=2")
    run(session.recipe(tmp_path / "whole", *options))
    crashed = Path(shutil.copytree(tmp_path / "whole", tmp_path / "run"))
    for folder in crashed.glob("checkpoint-*"):
        if folder.name != "checkpoint-000002":
            shutil.rmtree(folder)
    run(session.recipe(crashed, *options))
    assert metrics(tmp_path / "whole") == metrics(crashed)


# ---- what may not change


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optim.learning_rate=1e-3", "optim.learning_rate"),
        ("optim.betas=[0.8,0.99]", "optim.betas"),
        ("optim.weight_decay=0.1", "optim.weight_decay"),
        ("optim.max_grad_norm=1.0", "optim.max_grad_norm"),
        ("optim.loraplus_ratio=2", "optim.loraplus_ratio"),
        ("optim.kind=paged_adamw_32bit", "optim.kind"),
        ("optim.schedule=linear", "optim.schedule"),
        ("optim.warmup=4", "optim.warmup"),
        ("adapter.rank=2", "adapter.rank"),
        ("adapter.alpha=2", "adapter.alpha"),
        ("adapter.kind=rslora", "adapter.kind"),
        ("adapter.dropout=0.0", "adapter.dropout"),
        ("adapter.targets=[q_proj]", "adapter.targets"),
        ("quant.kind=fp4", "quant.kind"),
        ("quant.double=false", "quant.double"),
        ("train.seed=1", "train.seed"),
        ("train.global_batch=2", "train.global_batch"),
        ("data.packing=true", "data.packing"),
        ("data.max_length=60", "data.max_length"),
        ("data.train_on=all", "data.train_on"),
        ("data.eval_fraction=0.3", "data.eval_fraction"),
        ("model.dtype=bfloat16", "model.dtype"),
    ],
)
def test_a_change_of_the_mathematics_is_refused_by_its_key(
    sessions: Callable[[str], Session], override: str, key: str, tmp_path: Path
) -> None:
    session = sessions("adamw")
    output = session.stopped_at(3, tmp_path / "run")
    with pytest.raises(InputError) as caught:
        run(session.recipe(output, override))
    assert key in str(caught.value) and "resume" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.xdist_group("resume")
def test_other_rows_and_another_base_are_refused(sessions: Callable[[str], Session], zoo: Zoo, tmp_path: Path) -> None:
    session = sessions("adamw")
    output = session.stopped_at(3, tmp_path / "run")
    rows = write_rows(tmp_path / "rows.jsonl", ROWS, seed=1)
    with pytest.raises(InputError, match="data sha256"):
        run(session.recipe(output, f"data.train={rows}"))
    with pytest.raises(InputError, match="base sha256"):
        run(session.recipe(output, f"model.name={zoo('llama', seed=1)}"))


@pytest.mark.xdist_group("resume")
def test_what_changes_no_number_may_change(sessions: Callable[[str], Session], zoo: Zoo, tmp_path: Path) -> None:
    session = sessions("adamw")
    output = session.stopped_at(3, tmp_path / "run")
    moved = Path(shutil.copytree(zoo("llama"), tmp_path / "model"))
    rows = shutil.copy(session.data, tmp_path / "moved.jsonl")
    run(session.recipe(output, f"model.name={moved}", f"data.train={rows}", "train.keep=2", "memory.recompute=none"))
    assert differing(session.folder / "whole", output) == []


@pytest.mark.xdist_group("resume")
def test_a_run_may_be_made_longer(sessions: Callable[[str], Session], tmp_path: Path) -> None:
    session = sessions("adamw")
    run(session.recipe(tmp_path / "long", "train.max_steps=8", "optim.warmup=2"))
    run(session.recipe(tmp_path / "run", "train.max_steps=5", "optim.warmup=2"))
    run(session.recipe(tmp_path / "run", "train.max_steps=8", "optim.warmup=2"))
    assert differing(tmp_path / "long", tmp_path / "run") == []
    assert metrics(tmp_path / "long") == metrics(tmp_path / "run")


@pytest.mark.xdist_group("resume")
def test_never_forgets_what_was_there(sessions: Callable[[str], Session], tmp_path: Path) -> None:
    """resume=never starts a new run; when that one is interrupted, it is the one that goes on."""
    session = sessions("adamw")
    output = session.stopped_at(5, tmp_path / "run")
    with stop_after(2), pytest.raises(Stopped):
        run(session.recipe(output, "train.resume=never", "train.seed=9"))
    run(session.recipe(output, "train.seed=9"))
    run(session.recipe(tmp_path / "fresh", "train.seed=9"))
    assert differing(tmp_path / "fresh", output) == []
