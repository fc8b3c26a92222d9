"""Wrong input on the command line: one clear message, exit code 2, no half-written file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import CommandResult, qlora
from support.finished_run import FinishedRun

from qlora.recipe import planning

Zoo = Callable[..., Path]
pytestmark = pytest.mark.xdist_group("end to end")


def assert_refused(result: CommandResult, *words: str, code: int = 2) -> None:
    assert result.code == code, result.err
    assert result.out == "" and "Traceback" not in result.err
    last_line = result.err.strip().splitlines()[-1]
    assert result.err.count("error: ") == 1, result.err
    for word in words:
        assert word in result.err, (word, result.err)
    assert len(last_line) < 700


BAD_RECIPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "a misspelt key": (("optim.lerning_rate=1e-4",), ("lerning_rate", "learning_rate")),
    "a misspelt section": (("optm.learning_rate=1e-4",), ("optm", "optim")),
    "a wrong type": (("train.seed=soon",), ("train.seed", "soon")),
    "rank 0": (("adapter.rank=0",), ("adapter.rank", "0", ">= 1")),
    "an unknown word": (("quant.kind=nf5",), ("quant.kind", "nf5", "nf4")),
    "a setting twice": (("train.seed=1", "train.seed=2"), ("train.seed",)),
    "a target that matches nothing": (("adapter.targets=[q_prj]",), ("adapter.targets", "q_prj", "q_proj")),
    "a pattern that matches nothing": (("adapter.targets=nothing.*",), ("adapter.targets", "nothing")),
    "no data": (("data.train={folder}/gone.jsonl",), ("gone.jsonl",)),
    "an empty file": (("data.train={folder}/empty.jsonl",), ("empty.jsonl",)),
    "a broken line": (("data.train={folder}/broken.jsonl",), ("broken.jsonl:2",)),
    "records of no known format": (("data.train={folder}/strange.jsonl",), ("strange.jsonl", "columns")),
    "examples that are all too long": (("data.max_length=3",), ("max_length",)),
    "no model": (("model.name={folder}/gone",), ("gone", "config.json")),
    "a model without safetensors": (("model.name={folder}/pickled",), ("pytorch_model.bin",)),
    "a kind without support for this model": (("adapter.kind=full", "quant.kind=dense"), ("full",)),
    "an initialization of a rank that is too high": (("adapter.init=pissa", "adapter.rank=999"), ("999", "pissa")),
    "a checkpoint that does not exist": (("train.resume={folder}/gone",), ("gone",)),
    "float16 weights that train": (
        ("model.dtype=float16", "adapter.kind=full", "adapter.rank=null", "adapter.alpha=null", "quant.kind=dense"),
        ("model.dtype", "float16"),
    ),
    "a template that does not exist": (("model.chat_template={folder}/gone.jinja",), ("gone.jinja",)),
    "a template that is damaged": (("model.chat_template={folder}/bad.jinja",), ("bad.jinja",)),
}


@pytest.fixture(scope="module")
def bad(finished: FinishedRun) -> Path:
    """A folder with files that can't be used."""
    (finished.folder / "empty.jsonl").write_text("")
    good = finished.data.read_text().splitlines()
    (finished.folder / "broken.jsonl").write_text("\n".join([good[0], '{"messages": [', *good[1:]]))
    (finished.folder / "strange.jsonl").write_text('{"x": 1}\n{"x": 2}\n')
    (finished.folder / "bad.jinja").write_text("{% for message in messages %}")
    shutil.copytree(finished.model, finished.folder / "pickled")
    (finished.folder / "pickled" / "model.safetensors").rename(finished.folder / "pickled" / "pytorch_model.bin")
    return finished.folder


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_wrong_recipe_is_refused(finished: FinishedRun, bad: Path, case: str, tmp_path: Path) -> None:
    overrides, words = BAD_RECIPES[case]
    arguments = [override.format(folder=bad) for override in overrides]
    assert_refused(qlora("train", finished.recipe, f"train.output={tmp_path / 'run'}", *arguments), *words)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").rglob("*.safetensors"))
    assert not list(tmp_path.rglob(".partial-*"))


def test_a_missing_or_empty_recipe_is_refused(finished: FinishedRun, tmp_path: Path) -> None:
    assert_refused(qlora("train", tmp_path / "recipe.yml"), "recipe.yml", "no such file")
    (tmp_path / "empty.yaml").write_text("")
    assert_refused(qlora("train", tmp_path / "empty.yaml"), "empty.yaml")
    (tmp_path / "twice.yaml").write_text(finished.recipe.read_text() + "optim: {learning_rate: 1}\n")
    assert_refused(qlora("train", tmp_path / "twice.yaml"), "twice.yaml:6", "optim")
    (tmp_path / "tabs.yaml").write_text("model:\n\tname: x\n")
    assert_refused(qlora("train", tmp_path / "tabs.yaml"), "tabs.yaml:2")


def test_an_adapter_of_another_base_is_refused_everywhere(finished: FinishedRun, zoo: Zoo, tmp_path: Path) -> None:
    other = zoo("llama-tied-bias", seed=1)
    assert_refused(qlora("eval", other, "--adapter", finished.run, "--data", finished.data), "other weights")
    assert_refused(qlora("generate", other, "hello", "--adapter", f"mine={finished.run}"), "other weights")
    moved = Path(shutil.copytree(finished.run, tmp_path / "run"))
    recipe = (moved / "recipe.yaml").read_text().replace(str(finished.model), str(other))
    (moved / "recipe.yaml").write_text(recipe)
    assert_refused(qlora("eval", moved), "other weights")
    assert_refused(qlora("export", moved, tmp_path / "merged", "--to", "merged"), "other weights")
    assert not (tmp_path / "merged").exists()


def test_a_damaged_run_is_refused_with_the_file_name(finished: FinishedRun, tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        run = Path(shutil.copytree(finished.run, tmp_path / name))
        content = bytearray((run / name).read_bytes())
        content[-20] ^= 1
        (run / name).write_bytes(bytes(content))
        assert_refused(qlora("eval", run), name, "damaged")
        assert_refused(qlora("export", run, tmp_path / "out", "--to", "adapter"), name, "damaged")
    checkpoint = Path(shutil.copytree(finished.run / "checkpoint-000002", tmp_path / "c" / "checkpoint-000002"))
    shutil.copy(finished.run / "recipe.yaml", tmp_path / "c")
    (checkpoint / "manifest.json").unlink()
    assert_refused(qlora("eval", checkpoint), "manifest.json")


def test_an_unfinished_run_names_its_newest_checkpoint(finished: FinishedRun, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.run, tmp_path / "run"))
    (run / "adapter_model.safetensors").unlink()
    assert_refused(qlora("eval", run), "not finished", "checkpoint-000004")


BAD_ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no such command": (("trian",), ("trian",)),
    "no such option": (("eval", "{run}", "--jsn"), ("--jsn",)),
    "no argument": (("train",), ("recipe",)),
    "no such task": (("eval", "{run}", "--task", "los"), ("los", "loss")),
    "records without choices": (("eval", "{run}", "--task", "choice"), ("letters", "exact-match")),
    "a base model compared with itself": (
        ("eval", "{model}", "--data", "{data}", "--beside-base"),
        ("needs an adapter",),
    ),
    "no data for a plain model": (("eval", "{model}"), ("--data",)),
    "data that does not exist": (("eval", "{run}", "--data", "gone.jsonl"), ("gone.jsonl",)),
    "no such run": (("eval", "./gone"), ("gone",)),
    "no such adapter": (("eval", "{run}", "--adapter", "./gone"), ("gone",)),
    "prompts that do not exist": (("generate", "{run}", "gone.jsonl"), ("gone.jsonl",)),
    "no tokens": (("generate", "{run}", "hello", "--max-new-tokens", "0"), ("max-new-tokens",)),
    "no such target": (("export", "{run}", "{out}", "--to", "merge"), ("merge", "merged")),
    "no such base": (("export", "{run}", "{out}", "--to", "merged", "--base", "orginal"), ("orginal", "original")),
    "no such dtype": (("export", "{run}", "{out}", "--to", "merged", "--dtype", "int4"), ("int4", "float32")),
    "a plain model to export": (("export", "{model}", "{out}", "--to", "merged"), ("adapter",)),
    "a folder that exists": (("export", "{run}", "{run}", "--to", "merged"), ("already",)),
    "a GPU without a size": (("plan", "{recipe}", "--gpu", "big"), ("big",)),
    "rows below zero": (("export", "{run}", "{out}", "--to", "merged", "--rows", "-1"), ("rows",)),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_wrong_arguments_are_refused(finished: FinishedRun, case: str, tmp_path: Path) -> None:
    arguments, words = BAD_ARGUMENTS[case]
    paths = {
        "run": finished.run,
        "model": finished.model,
        "out": tmp_path / "out",
        "recipe": finished.recipe,
        "data": finished.data,
    }
    assert_refused(qlora(*(argument.format(**paths) for argument in arguments)), *words)
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob(".partial-*"))


def test_a_gpu_that_is_too_small_is_exit_code_3(finished: FinishedRun) -> None:
    result = qlora("plan", finished.recipe, "--gpu", "1KiB", "--json")
    assert result.code == 3 and json.loads(result.out)["fits"] is False


def test_a_disk_that_is_too_small_for_the_run_is_a_warning(
    finished: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "free_bytes", lambda folder: 1000)
    warnings = qlora("check", finished.recipe, "--json").json["warnings"]
    [message] = [warning["message"] for warning in warnings if warning["where"] == "train.output"]
    assert "are free on this disk" in message and "train.keep" in message


def test_a_system_error_about_a_path_is_not_called_a_bug(finished: FinishedRun) -> None:
    for arguments in (("eval", "x" * 300), ("train", finished.recipe, f"model.name={'x' * 300}")):
        assert_refused(qlora(*arguments), "File name too long")
