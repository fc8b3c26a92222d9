"""Objectives that compare answers: the same step in any split, packed or not, as trees or row by row, on two ranks."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.preferences import PAIRED, PAIRS, comparison_job, write_pairs
from support.rank_processes import pair
from support.small_runs import adapter_tensors, differing_tensors, metrics, recipe_of, run
from support.step_gradients import difference, gradients
from support.stopped_runs import assert_same_run, signal_in_step

from qlora.data.batching.packing import pack
from qlora.data.compared import ReferencedAnswers
from qlora.data.pairs import apart
from qlora.errors import Stopped
from qlora.recipe.recipe import Recipe
from qlora.training.job import Job
from qlora.training.objectives.reference_values import reference_values

Zoo = Callable[..., Path]
ROUNDING = 1e-6  # float32: sums of the same products in another order
KINDS = (*PAIRED, "kto")


@pytest.fixture(scope="module")
def jobs(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Job]:
    """A job of each objective, built once."""
    folder = tmp_path_factory.mktemp("comparisons")
    settings = {"dpo": ("objective.sft_weight=0.5",)}
    return cache(lambda kind: comparison_job(zoo("llama"), folder, kind, *settings.get(kind, ())))


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("kind", KINDS)
def test_any_split_into_micro_batches_gives_the_same_gradient(jobs: Callable[[str], Job], kind: str) -> None:
    job = jobs(kind)
    expected = gradients(job, micro_batch=PAIRS)
    assert float(expected.norm()) > 0
    for micro_batch in (1, 4):
        assert difference(gradients(job, micro_batch=micro_batch), expected) <= ROUNDING
    if kind in PAIRED:
        packed = pack(job.train_examples[:], 160)
        assert len(packed) < PAIRS
        assert difference(gradients(job, micro_batch=2, train=packed), expected) <= ROUNDING


def test_packing_changes_neither_the_estimate_of_kto_nor_its_gradient(
    jobs: Callable[[str], Job], zoo: Zoo, tmp_path: Path
) -> None:
    packed = comparison_job(zoo("llama"), tmp_path, "kto", "data.packing=true", "data.max_length=160")
    assert len(packed.train_examples) < PAIRS
    assert difference(gradients(packed, micro_batch=2), gradients(jobs("kto"))) <= ROUNDING
    assert packed.comparison is not None and packed.comparison.kl == pytest.approx(jobs("kto").comparison.kl, abs=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_reference_computed_before_gives_the_same_gradient(jobs: Callable[[str], Job], kind: str) -> None:
    job = jobs(kind)
    assert job.comparison is not None
    values = reference_values(job.comparison, job.train_examples, 4, job.processes)
    count = 2 * len(job.train_examples)
    assert len(values) == count and (values < 0).all()
    known = ReferencedAnswers(job.train_examples, values)
    expected = gradients(job)
    assert difference(gradients(job, train=known, micro_batch=4), expected) <= ROUNDING
    shifted = ReferencedAnswers(job.train_examples, values - np.arange(count, dtype=np.float32))
    assert difference(gradients(job, train=shifted), expected) > 1e-3  # the step reads them


@pytest.mark.sample(of=4, every=("in_one_row",))
@pytest.mark.parametrize("in_one_row", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("kind", PAIRED)
def test_a_pair_as_a_tree_trains_as_its_two_conversations(
    jobs: Callable[[str], Job], kind: str, in_one_row: bool
) -> None:
    job = jobs(kind)
    assert all(example.branches for example in job.train_examples)
    expected = gradients(job)
    assert job.comparison is not None
    separate = replace(job, comparison=replace(job.comparison, in_one_row=in_one_row))
    actual = gradients(separate, train=[apart(example) for example in job.train_examples])
    assert difference(actual, expected) <= 1e-5


def recipe_for(model: Path, data: Path, output: Path, *overrides: str) -> Recipe:
    options = ("objective.kind=dpo", "train.max_steps=3", "train.micro_batch=2", "optim.learning_rate=1e-3")
    return recipe_of(model, data, output, *options, "data.eval_fraction=0.2", *overrides)


@pytest.fixture(scope="module")
def whole(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pairs, and a run of three steps over them."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_pairs(folder / "pairs.jsonl", 10)
    run(recipe_for(zoo("llama"), data, folder / "run"))
    return data, folder / "run"


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_as_one(zoo: Zoo, whole: tuple[Path, Path], tmp_path: Path, strategy: str) -> None:
    data, expected = whole
    recipe = recipe_for(zoo("llama"), data, tmp_path / "run", f"distributed.kind={strategy}")
    children = pair(lambda rank, notify: partial(run, recipe)() and None, tmp_path)
    assert [child.wait() for child in children] == [0, 0], (tmp_path / "log-0").read_text()
    for event in ("train", "eval"):
        _assert_close(metrics(expected, event), metrics(tmp_path / "run", event))
    tensors, others = adapter_tensors(expected), adapter_tensors(tmp_path / "run")
    assert max(float((tensors[name] - others[name]).abs().max()) for name in tensors) <= 1e-5


def _assert_close(lines: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> None:
    for line, other in zip(lines, others, strict=True):
        assert line.pop("event") == other.pop("event")
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_a_stopped_run_resumes_exactly(zoo: Zoo, whole: tuple[Path, Path], tmp_path: Path) -> None:
    data, expected = whole
    stopped = recipe_for(zoo("llama"), data, tmp_path / "stopped")
    with signal_in_step(2), pytest.raises(Stopped):
        run(stopped)
    run(stopped)
    assert differing_tensors(expected, tmp_path / "stopped") == []
    assert_same_run(expected, tmp_path / "stopped")


def test_a_run_learns_the_preference_and_logs_it(whole: tuple[Path, Path]) -> None:
    first, *_, last = metrics(whole[1])
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4) and first["margin"] == pytest.approx(0.0, abs=1e-5)
    assert last["loss"] < first["loss"] and last["margin"] > 0.01 and last["accuracy"] == 1.0
    evaluations = metrics(whole[1], "eval")
    assert evaluations[0]["eval_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert evaluations[-1]["eval_margin"] > 0 and "perplexity" not in evaluations[-1]
    assert torch.isfinite(torch.tensor(evaluations[-1]["eval_chosen_log_prob"]))
