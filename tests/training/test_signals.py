"""SIGTERM and SIGINT end a run at an exact checkpoint."""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.child_processes import Child, Notify
from support.small_runs import metrics, recipe_of, run, write_records
from support.stopped_runs import RECORDS, STEPS, ReferenceRun, Zoo, assert_same_run, signal_in_step

from qlora.cli.app import run as run_cli
from qlora.errors import Stopped
from qlora.recipe.recipe import dump


@pytest.mark.sample(of=2)
@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_at_an_exact_checkpoint(
    reference_runs: Callable[[str], ReferenceRun], number: int, code: int, tmp_path: Path
) -> None:
    reference, output = reference_runs("adamw"), tmp_path / "run"
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with signal_in_step(4, number), pytest.raises(Stopped) as caught:
        run(reference.recipe(output, "train.save_every=null"))
    assert caught.value.exit_code == code and "checkpoint-000004" in str(caught.value)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert [folder.name for folder in output.glob("checkpoint-*")] == ["checkpoint-000004"]
    assert metrics(output)[-1]["step"] == 4 and not (output / "run.json").exists()
    run(reference.recipe(output))
    assert_same_run(reference.output, output)


@pytest.mark.xdist_group("resume")
def test_a_terminated_process_exits_with_143_and_resumes(zoo: Zoo, tmp_path: Path) -> None:
    data, output = write_records(tmp_path / "records.jsonl", RECORDS), tmp_path / "run"
    endless = recipe_of(zoo("llama"), data, output, "train.max_steps=100000", "optim.warmup=0", "adapter.dropout=0.1")
    (tmp_path / "recipe.yaml").write_text(dump(endless))

    def train(notify: Notify) -> int:
        sys.stdout = (tmp_path / "stdout").open("w")
        return run_cli(["train", str(tmp_path / "recipe.yaml")])

    process = Child(train, tmp_path / "log")
    deadline = time.monotonic() + 120
    while len(metrics(output)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send(signal.SIGTERM)
    code, stderr = process.wait(), (tmp_path / "log").read_text()
    assert code == 143 and (tmp_path / "stdout").read_text() == "" and "Traceback" not in stderr, stderr
    step = metrics(output)[-1]["step"]
    assert max(output.glob("checkpoint-*")).name == f"checkpoint-{step:06d}" and f"{step:06d}" in stderr
    short = (f"train.max_steps={step + 2}", "optim.warmup=0", "adapter.dropout=0.1")
    run(recipe_of(zoo("llama"), data, output, *short))
    run(recipe_of(zoo("llama"), data, tmp_path / "uninterrupted", *short))
    assert_same_run(tmp_path / "uninterrupted", output)


@pytest.mark.xdist_group("resume")
def test_the_newest_checkpoint_is_of_the_last_logged_step(
    reference_runs: Callable[[str], ReferenceRun], tmp_path: Path
) -> None:
    with signal_in_step(4), pytest.raises(Stopped):
        run(reference_runs("adamw").recipe(tmp_path / "run", "train.log_every=3", "train.save_every=null"))
    newest = max((tmp_path / "run").glob("checkpoint-*"))
    assert int(newest.name[-6:]) == metrics(tmp_path / "run")[-1]["step"]


@pytest.mark.xdist_group("resume")
def test_a_signal_in_the_last_step_loses_nothing(reference_runs: Callable[[str], ReferenceRun], tmp_path: Path) -> None:
    reference = reference_runs("paged_adamw_8bit")
    with signal_in_step(STEPS), pytest.raises(Stopped):
        run(reference.recipe(tmp_path / "run"))
    run(reference.recipe(tmp_path / "run"))
    assert_same_run(reference.output, tmp_path / "run")
