"""`qlora sweep` as it is typed: exit codes, one JSON object, a table, a page of all runs."""

from support.paths import ROOT
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.command_line import qlora
from support.small_runs import metrics
from support.sweeps import Sweep, Zoo, poisoned

from qlora.adapters.inject import adapted, frozen_linears, inject
from qlora.adapters.lora import Lora
from qlora.adapters.round_robin import RoundRobin
from qlora.model import Model
from qlora.model.frozen_digest import frozen_sha256
from qlora.model.load_base import load
from qlora.quant.nf4 import Nf4

KEYS = {"output", "best", "seconds", "planned_bytes", "peak_bytes", "page", "notes", "variants"}


@pytest.mark.xdist_group("sweep")
def test_a_sweep_answers_programs_and_people(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, "data.eval_fraction=0.3")
    said = qlora("sweep", sweep.path, "adapter.rank=2,8", "--json")
    found = said.json
    assert found.keys() == KEYS
    losses = {each["name"]: each["eval_loss"] for each in found["variants"]}
    assert losses.keys() == {"rank-2", "rank-8"} and found["best"] == min(losses, key=losses.__getitem__)
    lines = [line for line in said.err.splitlines() if line.startswith("rank-")]
    assert any(line.startswith("rank-2: step ") for line in lines)
    ends = [line.split()[0] for line in lines if not line.split()[0].endswith(":")]
    assert ends == sorted(losses, key=losses.__getitem__)  # the table, best first
    assert json.loads((tmp_path / "together" / "sweep.json").read_text()) == found
    page = (tmp_path / "together" / "comparison.html").read_text()
    assert "2 runs compared" in page and "adapter.rank" in page
    assert qlora("report", *(each["output"] for each in found["variants"]), "--out", tmp_path / "x.html").code == 0


@pytest.mark.xdist_group("sweep")
def test_losses_on_other_held_out_rows_are_not_compared(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, "data.eval_fraction=0.3")
    said = qlora("sweep", sweep.path, "train.seed=1,2", "--json")
    assert said.json["best"] is None and "don't compare" in said.err


@pytest.mark.xdist_group("sweep")
def test_a_failure_is_said_once_and_ends_in_exit_code_1(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, "train.micro_batch=4")
    with poisoned("rank-8", [1, 2, 3]):
        said = qlora("sweep", sweep.path, "adapter.rank=2,8", "--json")
    assert said.code == 1 and said.err.count("not finite for 3 steps in a row") == 1
    assert [bool(each["error"]) for each in json.loads(said.out)["variants"]] == [False, True]
    assert "1 of 2 variants failed: rank-8" in said.err.splitlines()[-1] and "Traceback" not in said.err


def test_the_plan_alone_is_told_and_exit_code_3_if_it_does_not_fit(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path)
    found = qlora("sweep", sweep.path, "adapter.rank=2,8", "--plan", "--json").json
    assert found["fits"] and [each["name"] for each in found["variants"]] == ["rank-2", "rank-8"]
    said = qlora("sweep", sweep.path, "adapter.rank=2,8", "memory.budget=1MiB", "--plan")
    assert said.code == 3 and "does not fit" in said.err
    assert qlora("sweep", sweep.path, "adapter.rank=2,8", "memory.budget=1MiB").code == 3
    assert not (tmp_path / "together").exists()


def test_several_processes_are_refused(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = qlora("sweep", Sweep(zoo("llama"), tmp_path).path, "adapter.rank=2,8")
    assert said.code == 2 and "one sweep a card" in said.err and "Traceback" not in said.err


@pytest.mark.xdist_group("sweep")
def test_a_process_that_is_terminated_exits_with_143_and_every_variant_is_whole(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, "train.max_steps=100000", "optim.warmup=0")
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora", "sweep", str(sweep.path), "adapter.rank=2,8"], cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    folders = [tmp_path / "together" / name for name in ("rank-2", "rank-8")]
    give_up = time.monotonic() + 120
    while len(metrics(folders[1])) < 3 and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 143 and out == "" and "Traceback" not in said, said
    for folder in folders:
        newest = max(folder.glob("checkpoint-*"))
        assert int(newest.name[-6:]) == metrics(folder)[-1]["step"] and newest.name in said


def test_a_turn_moves_nothing_and_the_base_is_the_same_object(zoo: Zoo) -> None:
    import torch

    base = load(Model(name=str(zoo("llama"))), Nf4(), torch.device("cpu"))
    frozen, before, turns = frozen_linears(base.model), frozen_sha256(base.model), RoundRobin(base.model)
    for rank in (2, 8):
        turns.use(None)
        inject(base.model, Lora(rank, 4.0), "all-linear", rank)
        turns.keep(f"rank-{rank}")
    layers = {}
    for name in ("rank-2", "rank-8"):
        turns.use(name)
        layers[name] = adapted(base.model)
    for _ in range(100):
        for name, held in layers.items():
            turns.use(name)
            now = adapted(base.model)
            assert [*now] == [*held] and all(now[path] is held[path] for path in held)
            assert all(layer.base is frozen[path] for path, layer in now.items())
    turns.drop("rank-8")
    assert not adapted(base.model) and frozen_sha256(base.model) == before
