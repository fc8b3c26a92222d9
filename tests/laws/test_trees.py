"""Conversations whose template rewrites the past: trees train as their answers one by one, however they run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from support.child_processes import Child
from support.rank_processes import pair
from support.small_runs import adapter_tensors, differing_tensors, metrics, recipe_of, run
from support.stopped_runs import assert_same_run, signal_in_step
from support.trees import REWRITES_THE_PAST as TEMPLATE
from support.trees import write_rewritten

from qlora.errors import Stopped
from qlora.recipe.recipe import Recipe

Zoo = Callable[..., Path]
RECORDS, STEPS = 6, 2
WHOLE_SET = "train.global_batch=64"  # an epoch is a step, so that its examples may be counted in any way


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a template, and conversations of one to three answers with thoughts."""
    return write_rewritten(tmp_path_factory.mktemp("trees"), RECORDS)


def recipe_for(model: Path, folder: Path, output: Path, *overrides: str) -> Recipe:
    settings = (f"model.chat_template={folder / 'template.jinja'}", "data.max_length=256", WHOLE_SET)
    options = (*settings, f"train.max_steps={STEPS}", "train.micro_batch=2", "optim.learning_rate=1e-3", *overrides)
    return recipe_of(model, folder / "records.jsonl", output, *options)


@pytest.fixture(scope="module")
def apart(zoo: Zoo, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which each answer is a sequence of its own: transformers' SDPA takes no trees."""
    output = tmp_path_factory.mktemp("apart") / "run"
    report = run(recipe_for(zoo("llama"), folder, output, "model.attention=sdpa"))["data"]
    assert report["packed_rows"] == sum(1 + number % 3 for number in range(RECORDS))
    return output


def assert_trained_alike(expected: Path, actual: Path) -> None:
    """Losses and adapters within float32 rounding of sums in another order."""
    for line, other in zip(metrics(expected), metrics(actual), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["trained_tokens"] == other["trained_tokens"]
    tensors, others = adapter_tensors(expected), adapter_tensors(actual)
    assert max(float((tensors[name] - others[name]).abs().max()) for name in tensors) <= 1e-5


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.micro_batch=1",),
        ("data.packing=true", "memory.recompute=all"),
        ("memory.offload_activations=true", "train.micro_batch=6"),
    ],
    ids=["alone", "packed, recomputed", "offloaded"],
)
def test_trees_train_as_their_answers_do(
    zoo: Zoo, folder: Path, apart: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    report = run(recipe_for(zoo("llama"), folder, tmp_path / "run", *overrides))["data"]
    assert report["trees"] == 2 * RECORDS // 3 and report["tokens"] < report["tokens_of_paths"]
    assert_trained_alike(apart, tmp_path / "run")


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_train_as_one(zoo: Zoo, folder: Path, apart: Path, tmp_path: Path, kind: str) -> None:
    recipe = recipe_for(zoo("llama"), folder, tmp_path / "run", f"distributed.kind={kind}")
    children: list[Child] = pair(lambda rank, notify: partial(run, recipe)() and None, tmp_path)
    assert [child.wait() for child in children] == [0, 0], (tmp_path / "log-0").read_text()
    assert_trained_alike(apart, tmp_path / "run")


def test_a_stopped_run_of_trees_resumes_exactly(zoo: Zoo, folder: Path, tmp_path: Path) -> None:
    whole = recipe_for(zoo("llama"), folder, tmp_path / "whole", "data.packing=true")
    run(whole)
    stopped = recipe_for(zoo("llama"), folder, tmp_path / "stopped", "data.packing=true")
    with signal_in_step(1), pytest.raises(Stopped):
        run(stopped)
    run(stopped)
    assert differing_tensors(tmp_path / "whole", tmp_path / "stopped") == []
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_the_template_of_a_run_is_used_where_the_base_has_another(zoo: Zoo, folder: Path, tmp_path: Path) -> None:
    """The file that the recipe names may change, or be gone, after the run."""
    from qlora.runs.load_run import load_run

    template = tmp_path / "mine.jinja"
    template.write_text(TEMPLATE)
    output = tmp_path / "run"
    run(recipe_for(zoo("llama"), folder, output, f"model.chat_template={template}", "train.max_steps=1"))
    template.write_text(TEMPLATE.replace("<think>", "<thought>"))
    lines: list[str] = []
    loaded = load_run(str(output), log=lines.append)
    assert loaded.encoder.template.text == TEMPLATE
    assert any("has changed since training" in line and "is used" in line for line in lines)
    (output / "chat_template.jinja").write_text("other")
    with pytest.raises(Exception, match="is damaged"):
        load_run(str(output))


def test_trees_are_on_the_attention_path_of_16_bits_too(zoo: Zoo, folder: Path, tmp_path: Path) -> None:
    """Loss and gradient differ by rounding; a leak changes them by far more."""
    lines = []
    for attention in ("auto", "sdpa"):
        options = (f"model.attention={attention}", "model.dtype=bfloat16", "train.max_steps=1")
        run(recipe_for(zoo("llama"), folder, tmp_path / attention, *options))
        lines += metrics(tmp_path / attention)
    assert lines[0]["loss"] != lines[1]["loss"]  # the first one took the trees
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=3e-3)
    assert lines[0]["grad_norm"] == pytest.approx(lines[1]["grad_norm"], rel=1e-2)
