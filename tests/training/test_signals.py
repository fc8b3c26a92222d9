"""SIGTERM and SIGINT end a run at an exact checkpoint."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.paths import ROOT
from support.small_runs import metrics, recipe_of, run, write_rows
from support.stopped_runs import ROWS, STEPS, Session, Zoo, same_run, stop_after

from qlora.errors import Stopped
from qlora.recipe.recipe import dump


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
def test_a_process_that_is_terminated_exits_with_143_and_goes_on(zoo: Zoo, tmp_path: Path) -> None:
    data, output = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "run"
    endless = recipe_of(zoo("llama"), data, output, "train.max_steps=100000", "optim.warmup=0", "adapter.dropout=0.1")
    (tmp_path / "recipe.yaml").write_text(dump(endless))
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora", "train", str(tmp_path / "recipe.yaml")], cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    give_up = time.monotonic() + 120
    while len(metrics(output)) < 3 and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 143 and out == "" and "Traceback" not in said, said
    step = metrics(output)[-1]["step"]
    assert max(output.glob("checkpoint-*")).name == f"checkpoint-{step:06d}" and f"{step:06d}" in said
    short = (f"train.max_steps={step + 2}", "optim.warmup=0", "adapter.dropout=0.1")
    run(recipe_of(zoo("llama"), data, output, *short))
    run(recipe_of(zoo("llama"), data, tmp_path / "whole", *short))
    same_run(tmp_path / "whole", output)


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
