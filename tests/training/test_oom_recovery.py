"""Out of memory: the run reduces its memory use and ends with the same adapter; the memory probe changes nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.published_models import workload
from support.small_runs import differing_tensors, metrics, recipe_of, run, write_records
from support.stopped_runs import RECORDS
from support.training_hooks import before_first_forward

from qlora.adapters.inject import adapted
from qlora.data.types import Example
from qlora.errors import QloraError
from qlora.memory.planner.config_reader import shapes_of
from qlora.memory.planner.memory_plan import Budget, plan
from qlora.memory.planner.search import UserChoices, next_smaller
from qlora.recipe.recipe import Recipe
from qlora.runs.resources import unplanned
from qlora.runs.setup import build_job, set_up
from qlora.runs.train import train
from qlora.training.checkpoint import Position
from qlora.training.job import Job
from qlora.training.loop import fit
from qlora.training.loss import TokenLoss
from qlora.training.memory_probe import longest_batch, probe_memory
from qlora.training.run_log import Log
from qlora.training.signals import StopSignal

Zoo = Callable[..., Path]
ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has little.")


@contextmanager
def out_of_memory(where: str, calls: set[int]) -> Iterator[None]:
    """Inside the block the n-th forward, or backward, of a layer runs out of memory for every n in `calls`."""
    count = 0

    def fail(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count in calls:
            raise ERROR

    def register(model: TokenLoss) -> None:
        layers = list(adapted(model).values())
        if where == "forward":
            layers[7].register_forward_pre_hook(fail)  # in the last layer: the others have gradients by then
        else:
            layers[2].A.register_hook(fail)

    with before_first_forward(register):
        yield


def recipe(zoo: Zoo, folder: Path, *overrides: str) -> Recipe:
    options = ("adapter.dropout=0.2", "train.micro_batch=1", "train.max_steps=3", *overrides)
    return recipe_of(zoo("llama"), write_records(folder / "records.jsonl", RECORDS), folder / "run", *options)


@pytest.fixture(scope="module")
def reference(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with enough memory."""
    folder = tmp_path_factory.mktemp("reference")
    run(recipe(zoo, folder))
    return folder / "run"


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("calls", [{1}, {6}, {3, 4}], ids=str)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_run_that_runs_out_of_memory_gives_the_same_adapter(
    zoo: Zoo, reference: Path, tmp_path: Path, where: str, calls: set[int], capsys: pytest.CaptureFixture[str]
) -> None:
    with out_of_memory(where, calls):
        train(recipe(zoo, tmp_path))
    assert differing_tensors(reference, tmp_path / "run") == []
    assert metrics(reference) == metrics(tmp_path / "run")
    log = capsys.readouterr().err
    assert log.count("Tried to allocate 2.00 GiB") == len(calls) and "1 of 2 layers recompute" in log


@pytest.mark.parametrize("setting", ["memory.recompute=all", "memory.recompute=none"])
def test_settings_of_the_user_are_kept_and_the_error_gives_advice(zoo: Zoo, tmp_path: Path, setting: str) -> None:
    with out_of_memory("forward", {1}), pytest.raises(QloraError, match=r"micro_batch.*max_length") as caught:
        run(recipe(zoo, tmp_path, setting))
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("choices", [UserChoices(), UserChoices(recompute=3), UserChoices(offload=False)], ids=str)
def test_every_reduction_uses_less_memory_and_they_end(choices: UserChoices, device: Any) -> None:
    shapes = shapes_of({"model_type": "llama"}, "llama")
    work = workload(shapes, recompute=choices.recompute or 0, device=device)
    sizes = [plan(work, Budget(0)).allocated_bytes]
    while smaller := next_smaller(work, choices):
        work = smaller
        sizes.append(plan(work, Budget(0)).allocated_bytes)
        assert len(sizes) < 12
    assert sizes == sorted(sizes, reverse=True)
    assert device == "cpu" or len(set(sizes)) == len(sizes) > 1  # on a CPU the update may need the most
    assert choices.recompute in (None, work.recompute) and not (choices.offload is False and work.offloaded)


def test_the_memory_probe_runs_the_longest_batch_and_changes_nothing(zoo: Zoo, tmp_path: Path) -> None:
    reference, probed = tmp_path / "reference", tmp_path / "probed"
    reference.mkdir(), probed.mkdir()
    lengths: list[int] = []

    def probe(job: Job) -> None:
        handle = job.model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
        probe_memory(job, moment_bytes=1024)
        handle.remove()
        assert lengths == [max(len(example) for example in job.train_examples)]

    expected, actual = fitted(recipe(zoo, reference)), fitted(recipe(zoo, probed), probe)
    assert lengths and all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert metrics(reference / "run") == metrics(probed / "run")


def fitted(recipe: Recipe, before: Callable[[Job], None] = lambda job: None) -> dict[str, torch.Tensor]:
    """The trainable tensors after the training loop; `before` is called with the job before the loop."""
    log = Log(Path(recipe.train.output), quiet=True)
    log.truncate(0)
    job = build_job(set_up(recipe, unplanned(recipe), log), log, StopSignal())
    before(job)
    fit(job, Position())
    return {name: parameter.detach().clone() for name, parameter in job.trainable.items()}


@pytest.mark.parametrize("micro_batch", [1, 3, 9])
def test_no_micro_batch_is_larger_than_the_longest_batch(micro_batch: int) -> None:
    examples = [Example("example", np.arange(length), np.arange(length)) for length in (3, 9, 4, 9, 1)]
    assert tuple(longest_batch(examples, micro_batch).input_ids.shape) == (min(micro_batch, 5), 9)
