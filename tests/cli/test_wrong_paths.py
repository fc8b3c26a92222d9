"""Wrong paths and names are reported before anything heavy is imported, by every command, each in one clear message."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from support.paths import ROOT

HEAVY = ("torch", "transformers", "bitsandbytes", "datasets", "accelerate", "safetensors", "pyarrow")
PROGRAM = f"""
import contextlib, io, json, sys
import qlora.cli
from qlora.cli.app import run
results = []
for arguments in json.loads(sys.argv[1]):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = run(arguments)
    results.append([code, err.getvalue(), sorted({{*{HEAVY}}} & {{*sys.modules}})])
print(json.dumps(results))
"""

NO_TENSORS = "\x02" + 7 * "\0" + "{}"  # a safetensors file
RECIPE = """\
model: base
data: {train: data/train.jsonl}
train: {output: runs/new}
"""
MISTAKES: Mapping[str, tuple[str, ...]] = {  # command -> words of the message
    "train nope.yaml": ("nope.yaml", "no such file", "'recipe.yaml'"),
    "train recipe.yaml model=bse": ("command line: model:", "bse does not exist", "Did you mean base?"),
    "train recipe.yaml model=data": ("model:", "data has no config.json", "Allowed:"),
    "train recipe.yaml model=pickled": ("model:", "pytorch_model.bin", "pickle"),
    "train recipe.yaml model=no-user/no-model": ("'no-user/no-model' is no folder here", "hub"),
    "train recipe.yaml model.name=base model.chat_template=gone.jinja": ("model.chat_template: no file gone.jinja",),
    "train recipe.yaml data.train=data/tain.jsonl": ("data.train: data/tain.jsonl", "Did you mean data/train.jsonl?"),
    "train recipe.yaml data.eval=dta/train.jsonl": ("data.eval: dta/train.jsonl", "Did you mean data/train.jsonl?"),
    "train recipe.yaml train.resume=gone": ("train.resume: gone does not exist", "auto", "never"),
    "train recipe.yaml train.resume=data": ("train.resume: data is not a complete checkpoint", "manifest.json"),
    "train recipe.yaml train.resume=runs/old": ("runs/old is a run", "runs/old/checkpoint-000002"),
    "train recipe.yaml train.output=recipe.yaml/run": ("train.output: can't write", "recipe.yaml is not a folder"),
    "check recipe.yaml train.report_to=[clearml]": ("train.report_to: not installed: clearml", "pip install clearml"),
    "check recipe.yaml data.train=gone.jsonl": ("data.train: gone.jsonl", "data and memory were not checked"),
    "check recipe.yaml train.resume=gone": ("train.resume: gone does not exist",),
    "preview recipe.yaml data.train=gone.jsonl": ("data.train: gone.jsonl",),
    "plan recipe.yaml model=bse": ("bse does not exist", "Did you mean base?"),
    "plan ./bse": ("bse does not exist",),
    "sweep recipe.yaml adapter.rank=2,4 data.train=gone.jsonl": ("data.train: gone.jsonl",),
    "train recipe.yaml data.train=no-user/no-data": ("data.train: no-user/no-data", "HF_HUB_OFFLINE"),
    "sweep recipe.yaml adapter.rank=2,4 --out recipe.yaml": ("--out: can't write", "recipe.yaml is not a folder"),
    "advise recipe.yaml data.train=gone.jsonl": ("data.train: gone.jsonl",),
    "advise data": ("data: found no run.json",),
    "init --model ./bse --data data/train.jsonl -o new.yaml": ("--model:", "bse does not exist"),
    "init --model base --data gone.jsonl -o new.yaml": ("--data:", "gone.jsonl"),
    "init --model base --data data/train.jsonl": ("--out: recipe.yaml exists already",),
    "init --model base --data data/train.jsonl -o new.yaml --gpu big": ("size: found 'big'", "24GiB"),
    "eval ./gone": ("./gone does not exist", "a run's folder"),
    "eval data": ("data: found no recipe.yaml, adapter_config.json or config.json", "a run's folder"),
    "eval runs/old --data data/tain.jsonl": ("--data: data/tain.jsonl", "Did you mean data/train.jsonl?"),
    "eval runs/old --adapter data": ("data/adapter_config.json does not exist",),
    "eval runs/old --task los": ("--task: no 'los'", "'loss'"),
    "eval base": ("--data is missing",),
    "generate runs/old gone.jsonl": ("gone.jsonl: no such file",),
    "generate base hello --adapter mine=gone": ("gone does not exist", "adapter_config.json"),
    "chat ./gone": ("./gone does not exist",),
    "chat runs/old --adapter mine=gone": ("gone does not exist",),
    "export runs/gone/ out --to merged": ("runs/gone", "Did you mean runs/lone?"),
    "export runs/old recipe.yaml/out --to merged": ("can't write", "recipe.yaml is not a folder"),
    "export runs/old out --to merge": ("--to: no 'merge'", "'merged'"),
    "export runs/lone out --to merged": ("data.train: gone.jsonl", "--data names others", "--rows 0"),
    "inspect runs/old --picture data": ("--picture: data is a folder",),
    "inspect runs/gon": ("runs/gon does not exist",),
    "inspect data": ("data: found no recipe.yaml and no adapter_config.json",),
    "resize gone out --rank 1": ("gone does not exist", "a run, a checkpoint or an adapter folder"),
    "resize runs/old recipe.yaml/out --rank 1": ("can't write recipe.yaml/out", "recipe.yaml is not a folder"),
    "combine out a=gone b=data": ("gone does not exist",),
    "combine data a=runs/old b=runs/lone": ("data exists already",),
    "push runs/gone me/mine": ("push: runs/gone is no folder", "Did you mean runs/lone?"),
    "push data me/mine": ("data holds no adapter and no model", "the folder of an export"),
    "push peft me/mine": ("'/nowhere/at/all', a path on this machine", "--base OWNER/NAME"),
    "convert gone.yml": ("gone.yml: no such file",),
    "convert recipe.yaml recipe.yaml": ("recipe.yaml exists already",),
    "report runs/gone": ("runs/gone: not a run", "run.json"),
    "report runs/old --out recipe.yaml/page.html": ("--out: recipe.yaml/page.html", "recipe.yaml is not a folder"),
    "recipes copy reference recipe.yaml/x.yaml": ("recipe.yaml is not a folder",),
    "demo --out recipe.yaml/demo": ("--out: can't write", "recipe.yaml is not a folder"),
    "eval peft": ("base_model_name_or_path", "/nowhere/at/all does not exist", "MODEL --adapter peft"),
    "eval pickled-adapter": ("found adapter_model.bin, which is pickle", "adapter_model.safetensors", "weights_only"),
    "eval runs/unfinished": ("not finished", "runs/unfinished/checkpoint-000004"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, data, a run and adapters: their files have the right names and no content."""
    folder = tmp_path_factory.mktemp("paths")
    write(folder / "base", "config.json", "model.safetensors")
    write(folder / "pickled", "config.json", "pytorch_model.bin")
    write(folder / "data", "train.jsonl")
    (folder / "recipe.yaml").write_text(RECIPE)
    files = ("run.json", "adapter_config.json", "adapter_model.safetensors")
    for name, data in (("old", "data/train.jsonl"), ("lone", "gone.jsonl"), ("unfinished", "data/train.jsonl")):
        write(folder / "runs" / name, *(files if name != "unfinished" else ()))
        (folder / "runs" / name / "recipe.yaml").write_text(RECIPE.replace("data/train.jsonl", data))
    write(folder / "runs/old/checkpoint-000002", "position.json")
    write(folder / "runs/unfinished/checkpoint-000004", "position.json")
    write(folder / "peft", "adapter_model.safetensors")
    (folder / "peft/adapter_config.json").write_text('{"base_model_name_or_path": "/nowhere/at/all"}')
    write(folder / "pickled-adapter", "adapter_config.json", "adapter_model.bin")
    return folder


def write(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(NO_TENSORS if name == "model.safetensors" else "{}\n")


@pytest.fixture(scope="module")
def answers(folder: Path) -> Iterator[Mapping[str, tuple[int, str, list[str]]]]:
    """For each command: exit code, stderr, and the heavy libraries imported so far; all in one process."""
    arguments = json.dumps([command.split() for command in MISTAKES])
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, arguments], capture_output=True, text=True, cwd=folder, env=environment()
    )
    assert result.returncode == 0, result.stderr
    yield dict(zip(MISTAKES, map(tuple, json.loads(result.stdout)), strict=True))  # type: ignore[arg-type]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **variables}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_wrong_path_is_reported_without_heavy_imports(
    answers: Mapping[str, tuple[int, str, list[str]]], command: str
) -> None:
    code, err, imported = answers[command]
    assert code == 2, err
    for word in MISTAKES[command]:
        assert word in err, err
    assert imported == [], f"{command} imports {imported}"
    assert "Traceback" not in err and "a bug in qlora" not in err


def test_all_wrong_paths_of_a_recipe_are_reported_with_their_lines(folder: Path) -> None:
    recipe = folder / "wrong.yaml"
    recipe.write_text("model: bse\ndata: {train: gone.jsonl}\ntrain:\n  output: runs/new\n  resume: gone\n")
    result = run_qlora(folder, "check", "wrong.yaml", "--json")
    problems = json.loads(result.stdout)["problems"]
    assert [problem["where"] for problem in problems] == ["wrong.yaml:1", "wrong.yaml:2", "wrong.yaml:5"]
    assert [problem["message"].split(":")[0] for problem in problems] == ["model", "data.train", "train.resume"]
    assert result.returncode == 2


def test_a_wrong_path_is_reported_in_less_than_1_5_seconds(folder: Path) -> None:
    # Processor time, not the clock: other tests run at the same time. About 0.6 on an idle machine.
    assert any(seconds_of_a_wrong_path(folder) < 1.5 for _ in range(3))  # the first is usually enough


def seconds_of_a_wrong_path(folder: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run_qlora(folder, "train", "recipe.yaml", "data.train=gone.jsonl").returncode == 2
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("mistake", ["train.resume=gone", "data.train=gone.jsonl", "train.output=recipe.yaml/run"])
def test_one_of_several_processes_reports_a_wrong_path(folder: Path, mistake: str) -> None:
    results = [
        run_qlora(folder, "train", "recipe.yaml", mistake, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2") for rank in "01"
    ]
    assert [result.returncode for result in results] == [2, 2]
    assert results[0].stderr.count("error: ") == 1 and results[1].stderr == ""


def run_qlora(folder: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "qlora", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment(**variables))
