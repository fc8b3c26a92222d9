"""`accelerate launch` as it is typed: several processes, two machines, its own configuration files; one voice."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.paths import ROOT
from support.small_runs import adapter_tensors, metrics, recipe_of, run, write_rows

from qlora.recipe.planning import unused_cards
from qlora.recipe.recipe import dump

Zoo = Callable[..., Path]
# Without cards these processes meet over gloo; --cpu would start a single one.
LAUNCH = ("-m", "accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no")


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch(where: Path, *arguments: str) -> "subprocess.Popen[str]":
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "QLORA_CACHE": ""}
    command = [sys.executable, *LAUNCH, *arguments]
    return subprocess.Popen(command, cwd=where, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def written(folder: Path, model: Path, *options: str) -> Path:
    """A machine's own folder with rows and a recipe, whose output is relative to it."""
    folder.mkdir()
    more = ("train.save_every=3", "optim.warmup=0", "data.eval_fraction=0.2", "data.train_on=all", *options)
    recipe = recipe_of(model, write_rows(folder / "rows.jsonl", 12), Path("run"), *more)
    (folder / "recipe.yaml").write_text(dump(recipe).replace(str(folder / "rows.jsonl"), "rows.jsonl"))
    return folder


@pytest.mark.slow
def test_two_machines_without_a_shared_disk_train_and_go_on(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two launchers on loopback: only machine 0 writes, and machine 1 is sent the checkpoint it does not have."""
    first, second = (written(tmp_path / name, zoo("llama")) for name in ("first", "second"))
    for steps, kind in ((3, "fsdp"), (6, "ddp")):
        port = free_port()
        machines = []
        for rank, folder in enumerate((first, second)):
            place = ("--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank), "--multi_gpu")
            meet = (
                "--main_process_ip",
                "127.0.0.1",
                "--main_process_port",
                port,
                "-m",
                "qlora",
                "train",
                "recipe.yaml",
            )
            machines.append(launch(folder, *place, *meet, f"train.max_steps={steps}", f"distributed.kind={kind}"))
        said = [machine.communicate(timeout=600)[1] for machine in machines]
        assert [machine.returncode for machine in machines] == [0, 0], said
        assert "done: " in said[0] and "done: " not in said[1]
    assert not (second / "run").exists()
    alone = written(tmp_path / "alone", zoo("llama"), "train.max_steps=6")
    monkeypatch.chdir(alone)
    run(recipe_of(zoo("llama"), Path("rows.jsonl"), Path("run"), "train.save_every=3", "optim.warmup=0",
                  "data.eval_fraction=0.2", "data.train_on=all"))  # fmt: skip
    for ours, theirs in zip(metrics(first / "run"), metrics(alone / "run"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    one, two = adapter_tensors(alone / "run"), adapter_tensors(first / "run")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp", "fsdp_offload"])
def test_a_launcher_file_trains_and_a_mistake_is_said_once(zoo: Zoo, tmp_path: Path, config: str) -> None:
    folder = written(tmp_path / config, zoo("llama"), "train.max_steps=2")
    file = ("--config_file", str(ROOT / f"recipes/accelerate/{config}.yaml"), "--main_process_port", free_port())
    good = launch(folder, *file, "-m", "qlora", "train", "recipe.yaml")
    said = good.communicate(timeout=600)[1]
    assert good.returncode == 0 and said.count("done: ") == 1, said
    assert ("shared by 2 processes" in said) == config.startswith("fsdp")
    bad = launch(folder, *file, "-m", "qlora", "train", "recipe.yaml", "adapter.rnk=3")
    said = bad.communicate(timeout=600)[1]
    assert bad.returncode != 0 and said.count("error: ") == 1 and "rnk" in said, said


@pytest.mark.parametrize(("processes", "cards"), [(1, 1), (2, 2), (1, 0)])
def test_nothing_is_said_of_cards_where_none_is_left(processes: int, cards: int) -> None:
    assert unused_cards(processes, cards) == ()


def test_one_process_on_a_machine_with_cards_says_what_to_type() -> None:
    (line,) = unused_cards(1, 4)
    assert "accelerate launch --num_processes 4 -m qlora train" in line
