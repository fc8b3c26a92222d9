"""A sweep of four variants against the same four runs, one after the other: python benchmarks/sweep.py.

Whole processes, imports and loading included. The page shows processor seconds: other programs on the machine lengthen
those of the clock, which are in the results beside the machine's load. `bound` is what sharing each rebuilt matrix
between the variants' rows could bring at most: four micro-batches of one row, against one micro-batch of four rows
through a single adapter.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import RESULTS, write
from workloads import make_base, rows_of

PAGE = Path(__file__).parents[1] / "docs" / "sweep.md"
BEGIN, END = "<!-- sweep -->\n", "<!-- /sweep -->"
RANKS = (4, 8, 16, 32)
LENGTH, ROWS, BATCH = 128, 64, 2


def measured(arguments: list[str]) -> dict[str, Any]:
    """One `qlora` command in a process of its own: seconds by the clock and of the processor, peak bytes."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "qlora", *arguments], stderr=subprocess.PIPE)
    said = process.stderr.read().decode() if process.stderr else ""
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(said)
    return {
        "seconds": time.perf_counter() - started,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
    }


def recipe_in(folder: Path, steps: int) -> str:
    """A recipe on a random base, rows of one length, no evaluation."""
    make_base(folder / "base", "100M", "cpu")
    with (folder / "rows.jsonl").open("w") as file:
        for ids in rows_of(ROWS, LENGTH, short=False):
            file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    sections = {
        "model": str(folder / "base"),
        "data": {"train": str(folder / "rows.jsonl"), "max_length": LENGTH, "packing": False, "eval_fraction": 0.0},
        "train": {"output": str(folder / "runs"), "max_steps": steps, "micro_batch": BATCH, "global_batch": BATCH},
    }
    (folder / "recipe.yaml").write_text(json.dumps(sections))
    return str(folder / "recipe.yaml")


def raced(folder: Path, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Rounds of: two runs alone, the sweep, the other two alone; the same adapters each time, bit for bit."""
    recipe, found = recipe_in(folder, steps), []
    measured(["train", recipe, "train.max_steps=1", f"train.output={folder / 'warm'}"])  # quantised once, and kept
    for number in range(rounds):
        at = folder / str(number)

        def alone(ranks: tuple[int, ...], at: Path = at) -> list[dict[str, Any]]:
            outputs = {rank: at / "alone" / f"rank-{rank}" for rank in ranks}
            return [measured(["train", recipe, f"adapter.rank={r}", f"train.output={o}"]) for r, o in outputs.items()]

        runs = alone(RANKS[:2])
        lists = f"adapter.rank={','.join(map(str, RANKS))}"
        sweep = measured(["sweep", recipe, lists, "--out", str(at / "together")])
        runs += alone(RANKS[2:])
        for rank in RANKS:
            ours, theirs = (at / way / f"rank-{rank}" / "adapter_model.safetensors" for way in ("together", "alone"))
            assert ours.read_bytes() == theirs.read_bytes(), f"rank {rank} is not what it is alone"
        found.append({"sweep": sweep, "alone": runs})
        print(json.dumps(found[-1]), flush=True)
    return found


def bound(folder: Path, repeats: int) -> list[dict[str, float]]:
    """Processor seconds of forward and backward: four times one row, and four rows at once, by tokens a row."""
    import numpy as np
    import torch

    from qlora.adapters.inject import inject
    from qlora.adapters.lora import Lora
    from qlora.data.batching.collate import collate
    from qlora.data.types import Example
    from qlora.memory.malloc import keep_freed_memory
    from qlora.model import Model
    from qlora.model.load_base import load
    from qlora.quant.nf4 import Nf4
    from qlora.training.loss import TokenLoss

    keep_freed_memory()
    base = load(Model(name=str(folder / "base")), Nf4(), torch.device("cpu"))
    inject(base.model, Lora(16, 32), "all-linear", 0)
    loss = TokenLoss(base.model).train()

    def seconds(batches: list[Any]) -> float:
        started = time.process_time()
        for batch in batches:
            loss(batch.input_ids, batch.labels, batch.position_ids, batch.starts).backward()
        return time.process_time() - started

    def best(run: Callable[[], float]) -> float:
        return min(run() for _ in range(repeats))

    found = []
    for length in (32, 64, 128, 256, 512):
        rows = [Example("", np.array(row, np.int32), np.array(row, np.int32)) for row in rows_of(4, length, False)]
        apart, joined = [collate([row], 0) for row in rows], [collate(rows, 0)]
        taken = [best(lambda: seconds(apart)), best(lambda: seconds(joined))]  # noqa: B023 - called at once
        found.append({"tokens": length, "apart": taken[0], "joined": taken[1], "gain": taken[0] / taken[1]})
        print(json.dumps(found[-1]), flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """What was measured, as docs/sweep.md shows it."""
    work, totals = found["workload"], found["totals"]
    head = (
        f"A random {work['shape']} Llama, {len(work['ranks'])} ranks, {work['steps']} steps of {work['rows']} rows of "
        f"{work['length']} tokens, one core of an {found['machine']['cpu']}, base kept quantised, imports included:"
    )
    lines = [head, "", "| | one sweep | four runs | ratio |", "|---|---|---|---|"]
    for key, words, unit, size in (
        ("processor_seconds", "seconds of the processor", "s", 1.0),
        ("peak_bytes", "peak memory (four runs: their sum)", "MiB", 2**20),
    ):
        both = [f"{totals[key][way] / size:,.0f} {unit}" for way in ("sweep", "alone")]
        lines.append(f"| {words} | {both[0]} | {both[1]} | {found[f'{key}_ratio']:.2f} |")
    lines += [
        "",
        "Processor seconds of forward and backward, the base's matrices rebuilt for each row or once for four:",
        "",
    ]
    lines += ["| tokens a row | 4 x 1 row | 1 x 4 rows | ratio |", "|---|---|---|---|"]
    for each in found["bound"]:
        lines.append(f"| {each['tokens']} | {each['apart']:.2f} | {each['joined']:.2f} | {each['gain']:.2f} |")
    return "\n".join(lines) + "\n"


def drawn(text: str) -> str:
    """`text` of the page with the table between its markers drawn anew."""
    before, _, rest = text.partition(BEGIN)
    found = json.loads((RESULTS / "sweep.json").read_text(encoding="utf-8"))
    return before + BEGIN + table(found) + END + rest.partition(END)[2]


def main() -> None:
    """Run, and write results/sweep.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["QLORA_CACHE"] = f"{scratch}/cache"
        rounds = raced(Path(scratch), options.steps, options.rounds)
        shared = bound(Path(scratch), repeats=3)
    totals = {
        key: {
            "sweep": min(each["sweep"][key] for each in rounds),
            "alone": min(sum(run[key] for run in each["alone"]) for each in rounds),
        }
        for key in ("seconds", "processor_seconds", "peak_bytes")
    }
    work = {"shape": "100M", "ranks": RANKS, "steps": options.steps, "rows": BATCH, "length": LENGTH, "device": "cpu"}
    ratios = {f"{key}_ratio": both["alone"] / both["sweep"] for key, both in totals.items()}
    print(write("sweep", {"workload": work, **ratios, "totals": totals, "rounds": rounds, "bound": shared}))
    PAGE.write_text(drawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
