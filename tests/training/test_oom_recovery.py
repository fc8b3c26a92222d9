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

from qlora.adapters.inject import adapted
from qlora.data.types import Example
from qlora.errors import QloraError
from qlora.memory.planner.config_reader import shapes_of
from qlora.memory.planner.memory_plan import Budget, plan
from qlora.memory.planner.search import UserChoices, next_smaller
from qlora.recipe.recipe import Recipe
from qlora.runs import train as train_module
from qlora.training.checkpoint import Position
from qlora.training.job import Job
from qlora.training.memory_probe import longest_batch, probe_memory

Zoo = Callable[..., Path]
ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has little.")


@contextmanager
def out_of_memory(where: str, calls: set[int]) -> Iterator[None]:
    """Inside the block the n-th forward, or backward, of a layer runs out of memory for every n in `calls`."""
    patch, count = pytest.MonkeyPatch(), [0]
    build_job = train_module.build_job

    def fail(*arguments: Any) -> None:
        count[0] += 1
        if count[0] in calls:
            raise ERROR

    def build_patched_job(*arguments: Any) -> Job:
        job = build_job(*arguments)
        layer: Any = list(adapted(job.model).values())[7]  # in the last layer: the others have gradients by then
        if where == "forward":
            layer.register_forward_pre_hook(fail)
        else:
            list(adapted(job.model).values())[2].A.register_hook(fail)
        return job

    patch.setattr(train_module, "build_job", build_patched_job)
    yield
    patch.undo()


def recipe(zoo: Zoo, folder: Path, *overrides: str) -> Recipe:
    options = ("adapter.dropout=0.2", "train.micro_batch=1", *overrides)
    return recipe_of(zoo("llama"), write_records(folder / "records.jsonl", RECORDS), folder / "run", *options)


@pytest.mark.parametrize("calls", [{1}, {6}, {3, 4}], ids=str)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_run_that_runs_out_of_memory_gives_the_same_adapter(
    zoo: Zoo, tmp_path: Path, where: str, calls: set[int], capsys: pytest.CaptureFixture[str]
) -> None:
    reference, recovered = tmp_path / "reference", tmp_path / "recovered"
    reference.mkdir(), recovered.mkdir()
    run(recipe(zoo, reference))
    with out_of_memory(where, calls):
        train_module.train(recipe(zoo, recovered))
    assert differing_tensors(reference / "run", recovered / "run") == []
    assert metrics(reference / "run") == metrics(recovered / "run")
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
    run(recipe(zoo, reference))
    patch, fit = pytest.MonkeyPatch(), train_module.fit
    lengths: list[int] = []

    def probe_and_fit(job: Job, position: Position) -> Position:
        handle = job.model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
        probe_memory(job, moment_bytes=1024)
        handle.remove()
        assert lengths == [max(len(example) for example in job.train_examples)]
        return fit(job, position)

    patch.setattr(train_module, "fit", probe_and_fit)
    run(recipe(zoo, probed))
    patch.undo()
    assert lengths and differing_tensors(reference / "run", probed / "run") == []
    assert metrics(reference / "run") == metrics(probed / "run")


@pytest.mark.parametrize("micro_batch", [1, 3, 9])
def test_no_micro_batch_is_larger_than_the_longest_batch(micro_batch: int) -> None:
    examples = [Example("example", np.arange(length), np.arange(length)) for length in (3, 9, 4, 9, 1)]
    assert tuple(longest_batch(examples, micro_batch).input_ids.shape) == (min(micro_batch, 5), 9)
