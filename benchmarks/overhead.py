"""What the loop itself costs: a run's seconds outside forward, backward and update, as a share: python overhead.py.

The whole of `qlora train` on a random base: rows chosen and collated, norms clipped, guards, metrics, memory read.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import write
from workloads import make_base

from qlora.recipe.recipe import from_mapping
from qlora.runs.strategy import open_processes
from qlora.runs.train import assemble, gather
from qlora.training.checkpoint import Position
from qlora.training.loop import Job, fit
from qlora.training.run_log import Log
from qlora.training.signals import StopSignal


class Clock:
    """Seconds spent inside the functions it has been put around."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed."""

        def timed(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


def job_of(folder: Path, steps: int) -> Job:
    """A run of short rows, packed to 512 tokens, one metrics line a step."""
    make_base(folder / "base", "100M", "cpu")
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(400):
            ids = [draw.randint(3, 31_000) for _ in range(draw.randint(20, 120))]
            file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    sections = {
        "model": str(folder / "base"),
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 512, "eval_fraction": 0.0},
        "train": {"output": str(folder / "run"), "max_steps": steps, "micro_batch": 1, "global_batch": 4},
    }
    recipe = from_mapping(sections)[0]
    log = Log(folder / "run", quiet=True)
    log.restart(0)
    return assemble(gather(recipe, open_processes(recipe), None, log), log, StopSignal())


def main() -> None:
    """Run, and write results/overhead.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        job = job_of(Path(scratch), options.steps)
        clock = Clock()
        job.model.forward = clock.around(job.model.forward)  # type: ignore[method-assign]
        job.processes.backward = clock.around(job.processes.backward)  # type: ignore[method-assign]
        job.optimizer.step = clock.around(job.optimizer.step)  # type: ignore[method-assign]
        started = time.perf_counter()
        fit(job, Position())
        seconds = time.perf_counter() - started
    share = 1 - clock.seconds / seconds
    print(f"{options.steps} steps, {seconds:.2f} s, {100 * share:.2f} % outside forward, backward and update")
    print(write("overhead", {"steps": options.steps, "seconds": seconds, "share_outside": share}))


if __name__ == "__main__":
    main()
