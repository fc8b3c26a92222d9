"""The command `qlora sweep`: exit codes, one JSON object, a table, a page that compares all runs."""

import json
import signal
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from support.child_processes import Child, Notify
from support.command_line import qlora
from support.small_runs import metrics
from support.sweeps import Sweep, Zoo, nan_gradient

from qlora.adapters.inject import adapted, inject
from qlora.adapters.lora import Lora
from qlora.adapters.round_robin import RoundRobin
from qlora.cli.app import run as run_cli
from qlora.model import Model
from qlora.model.frozen_digest import frozen_sha256
from qlora.model.linear_layers import frozen_linears
from qlora.model.load_base import load
from qlora.quant import Quant, build_quantizer

KEYS = {"output", "best", "seconds", "planned_bytes", "peak_bytes", "page", "notes", "variants"}


@pytest.mark.xdist_group("sweep")
def test_a_sweep_prints_a_json_object_and_a_table(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, "data.eval_fraction=0.3")
    result = qlora("sweep", sweep.path, "adapter.rank=2,8", "--json")
    summary = result.json
    assert summary.keys() == KEYS
    losses = {variant["name"]: variant["eval_loss"] for variant in summary["variants"]}
    assert losses.keys() == {"rank-2", "rank-8"} and summary["best"] == min(losses, key=losses.__getitem__)
    lines = [line for line in result.err.splitlines() if line.startswith("rank-")]
    assert any(line.startswith("rank-2: step ") for line in lines)
    table = [line.split()[0] for line in lines if not line.split()[0].endswith(":")]
    assert table == sorted(losses, key=losses.__getitem__)  # best first
    assert json.loads((tmp_path / "together" / "sweep.json").read_text()) == summary
    page = (tmp_path / "together" / "comparison.html").read_text()
    assert "2 runs compared" in page and "adapter.rank" in page
    assert (
        qlora("report", *(variant["output"] for variant in summary["variants"]), "--out", tmp_path / "x.html").code == 0
    )


@pytest.mark.xdist_group("sweep")
def test_losses_on_different_held_out_records_are_not_compared(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, "data.eval_fraction=0.3")
    result = qlora("sweep", sweep.path, "train.seed=1,2", "--json")
    assert result.json["best"] is None and "don't compare" in result.err


@pytest.mark.xdist_group("sweep")
def test_a_failure_is_reported_once_with_exit_code_1(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, "train.micro_batch=4")
    with nan_gradient("rank-8", [1, 2, 3]):
        result = qlora("sweep", sweep.path, "adapter.rank=2,8", "--json")
    assert result.code == 1 and result.err.count("not finite for 3 steps in a row") == 1
    assert [bool(variant["error"]) for variant in json.loads(result.out)["variants"]] == [False, True]
    assert "1 of 2 variants failed: rank-8" in result.err.splitlines()[-1] and "Traceback" not in result.err


def test_the_plan_is_printed_with_exit_code_3_if_it_does_not_fit(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path)
    plan = qlora("sweep", sweep.path, "adapter.rank=2,8", "--plan", "--json").json
    assert plan["fits"] and [variant["name"] for variant in plan["variants"]] == ["rank-2", "rank-8"]
    result = qlora("sweep", sweep.path, "adapter.rank=2,8", "memory.budget=1MiB", "--plan")
    assert result.code == 3 and "does not fit" in result.err
    assert qlora("sweep", sweep.path, "adapter.rank=2,8", "memory.budget=1MiB").code == 3
    assert not (tmp_path / "together").exists()


def test_several_processes_are_refused(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = qlora("sweep", Sweep(zoo("llama"), tmp_path).path, "adapter.rank=2,8")
    assert result.code == 2 and "qlora sweep runs in one process" in result.err and "Traceback" not in result.err


@pytest.mark.xdist_group("sweep")
def test_a_terminated_sweep_exits_with_143_and_saves_every_variant(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, "train.max_steps=100000", "optim.warmup=0")

    def work(notify: Notify) -> int:
        with (tmp_path / "stdout").open("w") as stdout, redirect_stdout(stdout):
            return run_cli(["sweep", str(sweep.path), "adapter.rank=2,8"])

    child = Child(work, tmp_path / "stderr")
    folders = [tmp_path / "together" / name for name in ("rank-2", "rank-8")]
    deadline = time.monotonic() + 120
    while len(metrics(folders[1])) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send(signal.SIGTERM)
    code, stderr = child.wait(), (tmp_path / "stderr").read_text()
    assert code == 143 and not (tmp_path / "stdout").read_text() and "Traceback" not in stderr, stderr
    for folder in folders:
        newest = max(folder.glob("checkpoint-*"))
        assert int(newest.name[-6:]) == metrics(folder)[-1]["step"] and newest.name in stderr


def test_switching_adapters_copies_nothing_and_keeps_the_base_model(zoo: Zoo) -> None:
    import torch

    base = load(Model(name=str(zoo("llama"))), build_quantizer(Quant()), torch.device("cpu"))
    frozen, before, adapters = frozen_linears(base.model), frozen_sha256(base.model), RoundRobin(base.model)
    for rank in (2, 8):
        adapters.activate(None)
        inject(base.model, Lora(rank, 4.0, 0.0), "all-linear", rank)
        adapters.add(f"rank-{rank}")
    layers = {}
    for name in ("rank-2", "rank-8"):
        adapters.activate(name)
        layers[name] = adapted(base.model)
    for _ in range(100):
        for name, added in layers.items():
            adapters.activate(name)
            active = adapted(base.model)
            assert [*active] == [*added] and all(active[path] is added[path] for path in added)
            assert all(layer.base is frozen[path] for path, layer in active.items())
    adapters.remove("rank-8")
    assert not adapted(base.model) and frozen_sha256(base.model) == before
