"""Overhead of the training loop: the fraction of a run outside forward, backward and update: python overhead.py.

Everything else in a step of `qlora train` counts: sampling, collating, clipping, guards, metrics, memory readings.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import write
from workloads import make_base

from qlora.recipe.recipe import from_mapping
from qlora.runs.resources import unplanned
from qlora.runs.setup import build_job, set_up
from qlora.training.checkpoint import Position
from qlora.training.job import Job
from qlora.training.loop import fit
from qlora.training.run_log import Log
from qlora.training.signals import StopSignal


class Stopwatch:
    """Total seconds spent inside the functions it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed."""

        def timed(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


def job_of(folder: Path, steps: int) -> Job:
    """A run on short examples, packed to 512 tokens, with one line of metrics a step."""
    make_base(folder / "base", "100M", "cpu")
    rng = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(400):
            ids = [rng.randint(3, 31_000) for _ in range(rng.randint(20, 120))]
            file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    sections = {
        "model": str(folder / "base"),
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 512, "eval_fraction": 0.0},
        "train": {"output": str(folder / "run"), "max_steps": steps, "micro_batch": 1, "global_batch": 4},
    }
    recipe = from_mapping(sections)[0]
    log = Log(folder / "run", quiet=True)
    log.truncate(0)
    return build_job(set_up(recipe, unplanned(recipe), log), log, StopSignal())


def main() -> None:
    """Run, and write results/overhead.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        job = job_of(Path(scratch), options.steps)
        watch = Stopwatch()
        job.model.forward = watch.wrap(job.model.forward)  # type: ignore[method-assign]
        job.processes.backward = watch.wrap(job.processes.backward)  # type: ignore[method-assign]
        job.optimizer.step = watch.wrap(job.optimizer.step)  # type: ignore[method-assign]
        started = time.perf_counter()
        fit(job, Position())
        seconds = time.perf_counter() - started
    outside = 1 - watch.seconds / seconds
    print(f"{options.steps} steps, {seconds:.2f} s, {100 * outside:.2f} % outside forward, backward and update")
    print(write("overhead", {"steps": options.steps, "seconds": seconds, "share_outside": outside}))


if __name__ == "__main__":
    main()
