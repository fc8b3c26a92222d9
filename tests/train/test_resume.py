"""A run that was stopped and went on is the run that never stopped: no bit of the adapter, no line of the losses differs."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import adapter_tensors, differing, metrics, recipe_of, run, write_rows
from safetensors.torch import load_file

from qlora import run as walk
from qlora.errors import InputError, QloraError, Stopped
from qlora.recipe import Recipe
from qlora.train import loop
from qlora.train.checkpoint import MANIFEST, OPTIMIZER, read

Zoo = Callable[..., Path]
ROWS, STEPS = 10, 6  # global batch 4: three steps an epoch, the last one short; two epochs

# Every optimiser, with and without dropout, packing, LoRA+, held-out rows. Rank 64 makes tensors that are kept in 8 bits.
COMBINATIONS = {
    "adamw": ("adapter.dropout=0.2",),
    "adamw_8bit": ("adapter.rank=64", "data.packing=true", "adapter.dropout=0.1"),
    "paged_adamw_32bit": ("data.packing=true", "optim.loraplus_ratio=4", "optim.schedule=cosine", "optim.warmup=2"),
    "paged_adamw_8bit": ("adapter.rank=64", "adapter.kind=rslora", "data.eval_fraction=0.2", "train.eval_every=2"),
}


class Session:
    """An uninterrupted run with a checkpoint after every step, and copies of it as they were at a step."""

    def __init__(self, model: Path, folder: Path, kind: str) -> None:
        self.model, self.folder, self.kind = model, folder, kind
        self.data = write_rows(folder / "rows.jsonl", ROWS)
        run(self.recipe(folder / "whole"))

    def recipe(self, output: Path, *overrides: str) -> Recipe:
        options = (f"optim.kind={self.kind}", "train.save_every=1", "train.keep=99", f"train.max_steps={STEPS}")
        return recipe_of(self.model, self.data, output, *options, *COMBINATIONS[self.kind], *overrides)

    def stopped_at(self, step: int, output: Path) -> Path:
        """What a run that died after `step` has left."""
        for folder in (self.folder / "whole").glob("checkpoint-*"):
            if int(folder.name[-6:]) <= step:
                shutil.copytree(folder, output / folder.name)
        shutil.copy(self.folder / "whole" / "metrics.jsonl", output)
        return output


@pytest.fixture(scope="module")
def sessions(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Session]:
    made: dict[str, Session] = {}

    def session(kind: str) -> Session:
        if kind not in made:
            made[kind] = Session(zoo("llama"), tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return session


def same_run(whole: Path, other: Path) -> None:
    assert differing(whole, other) == []
    for event in ("train", "eval"):
        assert metrics(whole, event) == metrics(other, event)
    results = [json.loads((folder / "run.json").read_text())["result"] for folder in (whole, other)]
    assert results[0] == results[1]


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
def test_a_loss_line_over_several_steps_is_the_same_after_a_stop(
    sessions: Callable[[str], Session], tmp_path: Path
) -> None:
    session = sessions("adamw")
    run(session.recipe(tmp_path / "whole", "train.log_every=3"))
    output = tmp_path / "run"
    session.stopped_at(2, output)
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", output)
    run(session.recipe(output, "train.log_every=3"))
    assert metrics(tmp_path / "whole") == metrics(output)


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
        ("train.micro_batch=1", "train.micro_batch"),
        ("data.packing=true", "data"),
        ("data.max_length=60", "data"),
        ("data.train_on=all", "data"),
        ("data.eval_fraction=0.3", "data"),
        ("model.dtype=bfloat16", "model.dtype"),
    ],
)
def test_a_change_of_the_mathematics_is_refused_by_its_key(
    sessions: Callable[[str], Session], override: str, key: str, tmp_path: Path
) -> None:
    session = sessions("adamw")  # with dropout, whose masks depend on the micro-batches
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


# ---- signals


class stop_after:  # noqa: N801 - reads as a verb
    """Inside the block the process sends itself a signal in the middle of a step."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number, self.patch = step, number, pytest.MonkeyPatch()

    def __enter__(self) -> None:
        taken = loop._step

        def step(job: Any, number: int) -> Any:
            if number + 1 == self.step:
                os.kill(os.getpid(), self.number)
            return taken(job, number)

        self.patch.setattr(loop, "_step", step)

    def __exit__(self, *error: object) -> None:
        self.patch.undo()


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_at_an_exact_checkpoint(
    sessions: Callable[[str], Session], number: int, code: int, tmp_path: Path
) -> None:
    session, output = sessions("adamw"), tmp_path / "run"
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with stop_after(4, number), pytest.raises(Stopped) as caught:
        run(session.recipe(output, "train.save_every=null"))
    assert caught.value.exit_code == code and "checkpoint-000004" in str(caught.value)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    assert [folder.name for folder in output.glob("checkpoint-*")] == ["checkpoint-000004"]
    assert metrics(output)[-1]["step"] == 4 and not (output / "run.json").exists()
    run(session.recipe(output))
    same_run(session.folder / "whole", output)


@pytest.mark.xdist_group("resume")
def test_the_newest_checkpoint_is_of_the_step_logged_last(sessions: Callable[[str], Session], tmp_path: Path) -> None:
    with stop_after(4), pytest.raises(Stopped):
        run(sessions("adamw").recipe(tmp_path / "run", "train.log_every=3", "train.save_every=null"))
    newest = max((tmp_path / "run").glob("checkpoint-*"))
    assert int(newest.name[-6:]) == metrics(tmp_path / "run")[-1]["step"]


@pytest.mark.xdist_group("resume")
def test_a_signal_in_the_last_step_loses_nothing(sessions: Callable[[str], Session], tmp_path: Path) -> None:
    session = sessions("paged_adamw_8bit")
    with stop_after(STEPS), pytest.raises(Stopped):
        run(session.recipe(tmp_path / "run"))
    run(session.recipe(tmp_path / "run"))
    same_run(session.folder / "whole", tmp_path / "run")


# ---- damage


@pytest.fixture(scope="module")
def checkpoint(sessions: Callable[[str], Session]) -> Path:
    return sessions("adamw").folder / "whole" / "checkpoint-000003"


@pytest.mark.xdist_group("resume")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_and_any_cut_is_noticed(checkpoint: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(file.name for file in checkpoint.iterdir() if file.name != MANIFEST)))
    path = checkpoint / name
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    flip = data.draw(st.booleans())
    damaged = bytearray(content)
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        path.write_bytes(bytes(damaged) if flip else content[:place])
        with pytest.raises(InputError, match=name):
            read(checkpoint)
    finally:
        path.write_bytes(content)
    assert read(checkpoint).position.step == 3


@pytest.mark.xdist_group("resume")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_manifest_is_noticed_or_says_the_same(checkpoint: Path, data: st.DataObject) -> None:
    path = checkpoint / MANIFEST
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        path.write_bytes(bytes(damaged))
        try:
            read(checkpoint)
        except InputError as error:
            assert str(checkpoint) in str(error)
        else:
            assert json.loads(damaged)["files"] == json.loads(content)["files"]
    finally:
        path.write_bytes(content)


@pytest.mark.xdist_group("resume")
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(
    sessions: Callable[[str], Session], tmp_path: Path
) -> None:
    session = sessions("adamw")
    output = session.stopped_at(4, tmp_path / "run")
    damaged = output / "checkpoint-000004" / OPTIMIZER
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (output / "checkpoint-000003" / MANIFEST).unlink()
    (output / ".partial-checkpoint-000005").mkdir()
    run(session.recipe(output))
    same_run(session.folder / "whole", output)
    assert not list(output.glob(".partial-*"))


@pytest.mark.xdist_group("resume")
def test_the_best_and_the_newest_checkpoints_stay(zoo: Zoo, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    options = ("data.eval_fraction=0.2", "train.eval_every=1", "train.save_every=1", "train.keep=2", "train.max_steps=9")
    run(recipe_of(zoo("llama"), data, tmp_path / "run", *options, "optim.learning_rate=0.1"))
    best = min(metrics(tmp_path / "run", "eval")[1:], key=lambda line: line["eval_loss"])["step"]
    found = {int(folder.name[-6:]) for folder in (tmp_path / "run").glob("checkpoint-*")}
    assert {8, 9} <= found <= {8, 9, best}


def all_finite(folder: Path) -> Iterator[bool]:
    for file in folder.rglob("*.safetensors"):
        for value in load_file(file).values():
            yield bool(torch.isfinite(value.float()).all())


# ---- what is not finite


class poisoned:  # noqa: N801 - reads as a state
    """Inside the block one adapter's gradient is not finite in the steps named (counted from 1)."""

    def __init__(self, steps: Sequence[int], value: float = float("nan")) -> None:
        self.steps, self.value, self.patch, self.calls = steps, value, pytest.MonkeyPatch(), 0

    def __enter__(self) -> None:
        assemble = walk.assemble

        def assembled(*arguments: Any) -> Any:
            job = assemble(*arguments)
            list(job.trainable.values())[3].register_hook(self.spoil)
            return job

        self.patch.setattr(walk, "assemble", assembled)

    def spoil(self, gradient: torch.Tensor) -> torch.Tensor:
        self.calls += 1  # one micro-batch a step
        return gradient * self.value if self.calls in self.steps else gradient

    def __exit__(self, *error: object) -> None:
        self.patch.undo()


def one_backward_a_step(zoo: Zoo, tmp_path: Path, *overrides: str) -> Recipe:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    options = ("train.micro_batch=4", "train.save_every=1", "train.keep=99", *overrides)
    return recipe_of(zoo("llama"), data, tmp_path / "run", *options)


@pytest.mark.xdist_group("resume")
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


@pytest.mark.xdist_group("resume")
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


@pytest.mark.xdist_group("resume")
def test_evaluations_are_at_the_start_at_the_end_and_in_between_as_asked(zoo: Zoo, tmp_path: Path) -> None:
    recipe = one_backward_a_step(zoo, tmp_path, "data.eval_fraction=0.2", "train.eval_every=4")
    result = run(recipe)["result"]
    lines = metrics(tmp_path / "run", "eval")
    assert [line["step"] for line in lines] == [0, 4, 6]
    assert result["eval_loss_before"] == lines[0]["eval_loss"] and result["eval_loss"] == lines[-1]["eval_loss"]
    assert result["best_eval_loss"] == min(line["eval_loss"] for line in lines)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.xdist_group("resume")
def test_a_run_that_gets_no_better_ends_early_and_stays_ended(zoo: Zoo, tmp_path: Path) -> None:
    options = ("data.eval_fraction=0.2", "train.eval_every=1", "train.early_stop=2", "train.max_steps=40")
    recipe = one_backward_a_step(zoo, tmp_path, *options, "optim.learning_rate=0.3")
    steps = run(recipe)["result"]["steps"]
    losses = [line["eval_loss"] for line in metrics(tmp_path / "run", "eval")]
    assert steps < 40 and len(losses) == steps + 1
    assert min(losses[-2:]) >= min(losses[:-2]) and losses.index(min(losses)) == len(losses) - 3
    assert run(recipe)["result"]["steps"] == steps


@pytest.mark.xdist_group("resume")
def test_no_held_out_rows_no_evaluation(zoo: Zoo, tmp_path: Path) -> None:
    result = run(one_backward_a_step(zoo, tmp_path))["result"]
    assert result["eval_loss"] is None and metrics(tmp_path / "run", "eval") == []
