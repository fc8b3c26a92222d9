"""`accelerate launch`: several processes, two machines, the configuration files of recipes/; one error message."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.paths import ROOT
from support.small_runs import adapter_tensors, metrics, recipe_of, run, write_records

from qlora.recipe.recipe import dump
from qlora.runs.resources import unused_gpus

Zoo = Callable[..., Path]
# Without GPUs these processes use gloo; --cpu would start a single one.
LAUNCH = ("-m", "accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no")


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def launch(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "QLORA_CACHE": ""}
    command = [sys.executable, *LAUNCH, *arguments]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def machine_folder(folder: Path, model: Path, *options: str) -> Path:
    """The working folder of a machine: records, and a recipe with paths relative to it."""
    folder.mkdir()
    settings = ("train.save_every=3", "optim.warmup=0", "data.eval_fraction=0.2", "data.train_on=all", *options)
    recipe = recipe_of(model, write_records(folder / "rows.jsonl", 12), Path("run"), *settings)
    (folder / "recipe.yaml").write_text(dump(recipe).replace(str(folder / "rows.jsonl"), "rows.jsonl"))
    return folder


@pytest.mark.slow
def test_two_machines_without_a_shared_disk_train_and_resume(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two launchers on loopback: only machine 0 writes; machine 1 receives the checkpoint that it does not have."""
    first, second = (machine_folder(tmp_path / name, zoo("llama")) for name in ("first", "second"))
    for steps, kind in ((3, "fsdp"), (6, "ddp")):
        port = free_port()
        launchers = []
        for rank, folder in enumerate((first, second)):
            ranks = ("--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank), "--multi_gpu")
            rendezvous = ("--main_process_ip", "127.0.0.1", "--main_process_port", port)
            command = ("-m", "qlora", "train", "recipe.yaml", f"train.max_steps={steps}", f"distributed.kind={kind}")
            launchers.append(launch(folder, *ranks, *rendezvous, *command))
        logs = [launcher.communicate(timeout=600)[1] for launcher in launchers]
        assert [launcher.returncode for launcher in launchers] == [0, 0], logs
        assert "done: " in logs[0] and "done: " not in logs[1]
    assert not (second / "run").exists()
    alone = machine_folder(tmp_path / "alone", zoo("llama"), "train.max_steps=6")
    monkeypatch.chdir(alone)
    run(recipe_of(zoo("llama"), Path("rows.jsonl"), Path("run"), "train.save_every=3", "optim.warmup=0",
                  "data.eval_fraction=0.2", "data.train_on=all"))  # fmt: skip
    for line, expected in zip(metrics(first / "run"), metrics(alone / "run"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    one, two = adapter_tensors(alone / "run"), adapter_tensors(first / "run")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp", "fsdp_offload"])
def test_a_launcher_file_trains_and_an_error_is_printed_once(zoo: Zoo, tmp_path: Path, config: str) -> None:
    folder = machine_folder(tmp_path / config, zoo("llama"), "train.max_steps=2")
    file = ("--config_file", str(ROOT / f"recipes/accelerate/{config}.yaml"), "--main_process_port", free_port())
    good = launch(folder, *file, "-m", "qlora", "train", "recipe.yaml")
    log = good.communicate(timeout=600)[1]
    assert good.returncode == 0 and log.count("done: ") == 1, log
    assert ("sharded over 2 processes" in log) == config.startswith("fsdp")
    bad = launch(folder, *file, "-m", "qlora", "train", "recipe.yaml", "adapter.rnk=3")
    log = bad.communicate(timeout=600)[1]
    assert bad.returncode != 0 and log.count("error: ") == 1 and "rnk" in log, log


@pytest.mark.parametrize(("processes", "gpus"), [(1, 1), (2, 2), (1, 0)])
def test_there_is_no_note_if_no_gpu_is_unused(processes: int, gpus: int) -> None:
    assert unused_gpus(processes, gpus) == ()


def test_one_process_on_several_gpus_logs_the_launch_command() -> None:
    (line,) = unused_gpus(1, 4)
    assert "accelerate launch --num_processes 4 -m qlora train" in line
