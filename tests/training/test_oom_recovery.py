"""Out of memory: the run steps down, says so, and is the run that had enough; the rehearsal changes nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_runs import differing, metrics, recipe_of, run, write_rows
from support.stopped_runs import ROWS

from qlora.adapters.inject import adapted
from qlora.data.types import Example
from qlora.errors import QloraError
from qlora.memory.planner.config_reader import shapes_of
from qlora.memory.planner.memory_plan import Budget, plan
from qlora.memory.planner.search import UserChoices, next_smaller
from qlora.memory.planner.workload import AdapterSizes, Workload
from qlora.recipe.recipe import Recipe
from qlora.runs import train as walk
from qlora.training.checkpoint import Position
from qlora.training.loop import Job, rehearse
from qlora.training.oom_recovery import longest

Zoo = Callable[..., Path]
ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has little.")


@contextmanager
def too_little(where: str, when: set[int]) -> Iterator[list[Job]]:
    """Inside the block the n-th forward, or backward, of a layer runs out of memory for every n in `when`."""
    patch, calls, jobs = pytest.MonkeyPatch(), [0], list[Job]()
    assemble = walk.assemble

    def fail(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] in when:
            raise ERROR

    def assembled(*arguments: Any) -> Job:
        job = assemble(*arguments)
        layer: Any = list(adapted(job.model).values())[7]  # in the last layer: others have their gradients by then
        if where == "forward":
            layer.register_forward_pre_hook(fail)
        else:
            list(adapted(job.model).values())[2].A.register_hook(fail)
        jobs.append(job)
        return job

    patch.setattr(walk, "assemble", assembled)
    yield jobs
    patch.undo()


def recipe(zoo: Zoo, folder: Path, *overrides: str) -> Recipe:
    options = ("adapter.dropout=0.2", "train.micro_batch=1", *overrides)
    return recipe_of(zoo("llama"), write_rows(folder / "rows.jsonl", ROWS), folder / "run", *options)


@pytest.mark.parametrize("when", [{1}, {6}, {3, 4}], ids=str)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_run_that_ran_out_is_the_run_that_did_not(
    zoo: Zoo, tmp_path: Path, where: str, when: set[int], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, short = tmp_path / "whole", tmp_path / "short"
    whole.mkdir(), short.mkdir()
    run(recipe(zoo, whole))
    with too_little(where, when):
        walk.train(recipe(zoo, short))
    assert differing(whole / "run", short / "run") == []
    assert metrics(whole / "run") == metrics(short / "run")
    said = capsys.readouterr().err
    assert said.count("Tried to allocate 2.00 GiB") == len(when) and "1 of 2 layers recompute" in said


@pytest.mark.parametrize("way", ["memory.recompute=all", "memory.recompute=none"])
def test_what_the_user_set_stays_and_the_error_says_what_would_help(zoo: Zoo, tmp_path: Path, way: str) -> None:
    with too_little("forward", {1}), pytest.raises(QloraError, match=r"micro_batch.*max_length") as caught:
        run(recipe(zoo, tmp_path, way))
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("fixed", [UserChoices(), UserChoices(recompute=3), UserChoices(offload=False)], ids=str)
def test_every_step_down_takes_less_and_there_is_an_end(fixed: UserChoices, device: Any) -> None:
    shapes = shapes_of({"model_type": "llama"}, "llama")
    work = Workload(shapes, AdapterSizes(shapes.matrices), recompute=fixed.recompute or 0, device=device)
    taken = [plan(work, Budget(0)).allocated_bytes]
    while less := next_smaller(work, fixed):
        work = less
        taken.append(plan(work, Budget(0)).allocated_bytes)
        assert len(taken) < 12
    assert taken == sorted(taken, reverse=True)
    assert device == "cpu" or len(set(taken)) == len(taken) > 1  # on a CPU the update may be what takes most
    assert fixed.recompute in (None, work.recompute) and not (fixed.offload is False and work.parked)


def test_the_rehearsal_runs_the_longest_rows_and_changes_nothing(zoo: Zoo, tmp_path: Path) -> None:
    plain, rehearsed = tmp_path / "plain", tmp_path / "rehearsed"
    plain.mkdir(), rehearsed.mkdir()
    run(recipe(zoo, plain))
    patch, fit = pytest.MonkeyPatch(), walk.fit
    seen: list[int] = []

    def fitted(job: Job, position: Position) -> Position:
        handle = job.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
        rehearse(job, moment_bytes=1024)
        handle.remove()
        assert seen == [max(len(row) for row in job.train)]
        return fit(job, position)

    patch.setattr(walk, "fit", fitted)
    run(recipe(zoo, rehearsed))
    patch.undo()
    assert seen and differing(plain / "run", rehearsed / "run") == []
    assert metrics(plain / "run") == metrics(rehearsed / "run")


@pytest.mark.parametrize("micro_batch", [1, 3, 9])
def test_no_micro_batch_is_larger_than_the_longest(micro_batch: int) -> None:
    rows = [Example("row", np.arange(length), np.arange(length)) for length in (3, 9, 4, 9, 1)]
    assert tuple(longest(rows, micro_batch).input_ids.shape) == (min(micro_batch, 5), 9)
