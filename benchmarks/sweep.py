"""A sweep of four variants against the same four runs, one after the other: python benchmarks/sweep.py.

Whole processes, imports and loading included. The page shows processor seconds; wall-clock seconds depend on the
machine's load and are in the results, with that load. `bound` is an upper bound on what the variants could gain by
sharing each dequantized matrix: four micro-batches of one sequence against one of four, through a single adapter.
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

from harness import RESULTS, write
from workloads import make_base, token_lists

PAGE = Path(__file__).parents[1] / "docs" / "sweep.md"
BEGIN, END = "<!-- sweep -->\n", "<!-- /sweep -->"
RANKS = (4, 8, 16, 32)
LENGTH, EXAMPLES, BATCH = 128, 64, 2


def measured(arguments: list[str]) -> dict[str, Any]:
    """One `qlora` command in a new process: wall-clock seconds, processor seconds, peak bytes."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "qlora", *arguments], stderr=subprocess.PIPE)
    errors = process.stderr.read().decode() if process.stderr else ""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(errors)
    return {
        "seconds": time.perf_counter() - started,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def recipe_in(folder: Path, steps: int) -> str:
    """Path of a recipe with a random base, examples of one length, and no evaluation."""
    make_base(folder / "base", "100M", "cpu")
    with (folder / "rows.jsonl").open("w") as file:
        for ids in token_lists(EXAMPLES, LENGTH, short=False):
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
    recipe, results = recipe_in(folder, steps), []
    measured(["train", recipe, "train.max_steps=1", f"train.output={folder / 'warm'}"])  # fills the quantized cache
    for number in range(rounds):
        output = folder / str(number)

        def alone(ranks: tuple[int, ...], output: Path = output) -> list[dict[str, Any]]:
            outputs = {rank: output / "alone" / f"rank-{rank}" for rank in ranks}
            return [measured(["train", recipe, f"adapter.rank={r}", f"train.output={o}"]) for r, o in outputs.items()]

        runs = alone(RANKS[:2])
        lists = f"adapter.rank={','.join(map(str, RANKS))}"
        sweep = measured(["sweep", recipe, lists, "--out", str(output / "together")])
        runs += alone(RANKS[2:])
        for rank in RANKS:
            paths = [output / way / f"rank-{rank}" / "adapter_model.safetensors" for way in ("together", "alone")]
            assert paths[0].read_bytes() == paths[1].read_bytes(), f"rank {rank}: the sweep's adapter differs"
        results.append({"sweep": sweep, "alone": runs})
        print(json.dumps(results[-1]), flush=True)
    return results


def bound(folder: Path, repeats: int) -> list[dict[str, float]]:
    """Processor seconds of forward and backward: four times one sequence, and four at once, by tokens a sequence."""
    import numpy as np
    import torch

    from qlora.adapters.inject import inject
    from qlora.adapters.lora import Lora
    from qlora.data.batching.collate import collate
    from qlora.data.types import Example
    from qlora.memory.malloc import keep_freed_memory
    from qlora.model import Model
    from qlora.model.load_base import load
    from qlora.quant import Quant, build_quantizer
    from qlora.training.loss import TokenLoss

    keep_freed_memory()
    base = load(Model(name=str(folder / "base")), build_quantizer(Quant()), torch.device("cpu"))
    inject(base.model, Lora(16, 32, 0.0), "all-linear", 0)
    loss = TokenLoss(base.model).train()

    def seconds(batches: list[Any]) -> float:
        started = time.process_time()
        for batch in batches:
            loss(batch.input_ids, batch.labels, batch.position_ids, batch.layout).backward()
        return time.process_time() - started

    def best(run: Callable[[], float]) -> float:
        return min(run() for _ in range(repeats))

    results = []
    for length in (32, 64, 128, 256, 512):
        lists = token_lists(4, length, False)
        examples = [Example("", np.array(ids, np.int32), np.array(ids, np.int32)) for ids in lists]
        single, joined = [collate([example], 0) for example in examples], [collate(examples, 0)]
        spent = [best(lambda: seconds(single)), best(lambda: seconds(joined))]  # noqa: B023 - called at once
        results.append({"tokens": length, "apart": spent[0], "joined": spent[1], "gain": spent[0] / spent[1]})
        print(json.dumps(results[-1]), flush=True)
    return results


def table(results: dict[str, Any]) -> str:
    """The measurements as Markdown tables, for docs/sweep.md."""
    work, totals = results["workload"], results["totals"]
    head = (
        f"A random {work['shape']} Llama, {len(work['ranks'])} ranks, {work['steps']} steps of {work['rows']} sequences"
        f" of {work['length']} tokens, one core of an {results['machine']['cpu']}, quantized base cached, imports "
        "included:"
    )
    lines = [head, "", "| | one sweep | four runs | ratio |", "|---|---|---|---|"]
    for key, label, unit, size in (
        ("processor_seconds", "processor seconds", "s", 1.0),
        ("peak_bytes", "peak memory (four runs: their sum)", "MiB", 2**20),
    ):
        both = [f"{totals[key][way] / size:,.0f} {unit}" for way in ("sweep", "alone")]
        lines.append(f"| {label} | {both[0]} | {both[1]} | {results[f'{key}_ratio']:.2f} |")
    lines += [
        "",
        "Processor seconds of forward and backward; the base's matrices are dequantized once per sequence, or once for "
        "four:",
        "",
    ]
    lines += ["| tokens a sequence | 4 x 1 sequence | 1 x 4 sequences | ratio |", "|---|---|---|---|"]
    for row in results["bound"]:
        lines.append(f"| {row['tokens']} | {row['apart']:.2f} | {row['joined']:.2f} | {row['gain']:.2f} |")
    return "\n".join(lines) + "\n"


def redraw(text: str) -> str:
    """`text` of the page with the table between its markers redrawn."""
    before, _, rest = text.partition(BEGIN)
    results = json.loads((RESULTS / "sweep.json").read_text(encoding="utf-8"))
    return before + BEGIN + table(results) + END + rest.partition(END)[2]


def main() -> None:
    """Measure, write results/sweep.json, and redraw the table of docs/sweep.md."""
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
            "sweep": min(result["sweep"][key] for result in rounds),
            "alone": min(sum(run[key] for run in result["alone"]) for result in rounds),
        }
        for key in ("seconds", "processor_seconds", "peak_bytes")
    }
    work = {"shape": "100M", "ranks": RANKS, "steps": options.steps, "rows": BATCH, "length": LENGTH, "device": "cpu"}
    ratios = {f"{key}_ratio": both["alone"] / both["sweep"] for key, both in totals.items()}
    print(write("sweep", {"workload": work, **ratios, "totals": totals, "rounds": rounds, "bound": shared}))
    PAGE.write_text(redraw(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
