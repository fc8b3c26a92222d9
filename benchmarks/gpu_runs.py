"""Whole runs on a GPU: do they start twice, resume, offload, repeat a step, repeat in every bit?

`python benchmarks/gpu_runs.py first|policies|memory|deterministic` writes results/gpu-runs-NAME.json.
"""

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_report import Report
from workloads import make_base

import qlora
from qlora.memory.copy_stream import CopyStream, host_bytes
from qlora.recipe.recipe import Recipe, from_mapping
from qlora.runs.evaluate import evaluate_run
from qlora.runs.load_run import load_run
from qlora.training.run_log import read_metrics

DEMO = Path(qlora.__file__).parent / "demo"
KEEP = ("memory.recompute=none", "memory.offload_activations=false")
POLICIES = {
    "all layers recompute": ("memory.recompute=all", "memory.offload_activations=false"),
    "activations offloaded": ("memory.recompute=none", "memory.offload_activations=true"),
    "offloaded and recomputed": ("memory.recompute=all", "memory.offload_activations=true"),
    "weights streamed": (*KEEP, "memory.weights=stream"),
    "streamed and offloaded": ("memory.recompute=none", "memory.weights=stream", "memory.offload_activations=true"),
    "optimizer offloaded": (*KEEP, "optim.kind=offloaded_adamw"),
}
SHAPE, LENGTH = "250M", 1024  # of the runs that must fill some memory


class Runs:
    """Runs of one base model in one folder."""

    def __init__(self, folder: Path, model: Path, data: Path, *settings: str) -> None:
        self.folder, self.model, self.data, self.settings = folder, model, data, settings

    def recipe(self, name: str, *overrides: str) -> Recipe:
        """The recipe of the run called `name`; the last override of a key counts."""
        mapping: dict[str, Any] = {
            "model": {"name": str(self.model), "dtype": "bfloat16"},
            "data": {"train": str(self.data), "eval_fraction": 0.1, "max_length": 128, "packing": False},
            "optim": {"kind": "adamw", "learning_rate": 5e-3},
            "train": {"output": str(self.folder / name), "max_steps": 8, "micro_batch": 4, "global_batch": 8},
        }
        last = {override.partition("=")[0]: override for override in (*self.settings, *overrides)}
        return from_mapping(mapping, overrides=[*last.values()])[0]

    def train(self, name: str, *overrides: str) -> dict[str, Any]:
        """The losses of a run, its adapter's digest, its seconds and the peak of allocated memory."""
        recipe, started = self.recipe(name, *overrides), time.monotonic()
        torch.cuda.reset_peak_memory_stats()
        qlora.train(recipe, quiet=True)
        output = Path(recipe.train.output)
        lines = [line for line in read_metrics(output) if line["event"] == "train"]
        return {
            "losses": [line["loss"] for line in lines],
            "adapter_sha256": hashlib.sha256((output / "adapter_model.safetensors").read_bytes()).hexdigest(),
            "seconds": time.monotonic() - started,
            "peak_bytes": torch.cuda.max_memory_allocated(),
        }


def demo_runs(folder: Path, *settings: str) -> Runs:
    """Runs of the embedded base model."""
    return Runs(folder, DEMO / "base", DEMO / "data" / "train.jsonl", *settings)


def first(report: Report, runs: Runs) -> None:
    """Item 1: a run, the second start of its base, a resume with AdamW, evaluation, generation, export."""
    first_run: dict[str, Any] = {}

    def train() -> dict[str, Any]:
        first_run.update(runs.train("first"))
        return {**first_run, "right": first_run["losses"][-1] < first_run["losses"][0]}

    def second() -> dict[str, Any]:
        result = runs.train("second")
        losses = zip(result["losses"], first_run["losses"], strict=True) if first_run else ()
        return {**result, "right": all(abs(one - other) <= 1e-2 * abs(other) for one, other in losses)}

    def resume() -> dict[str, Any]:
        runs.train("resumed", "train.max_steps=4", "train.save_every=2")
        result = runs.train("resumed", "train.max_steps=8", "train.save_every=2")
        return {**result, "right": len(result["losses"]) == 8}

    report.check("train in bfloat16", train)
    report.check("second start of the same base", second)
    report.check("resume with AdamW", resume)
    output = runs.folder / "first"
    report.check("evaluate", lambda: "loss" in evaluate_run(load_run(str(output)), None, "loss"))
    report.check("generate", lambda: bool(qlora.generate(str(output), "What is 2 + 2?", max_new_tokens=8)))
    report.check("export merged", lambda: bool(qlora.export(str(output), runs.folder / "merged", "merged").bytes))


def policies(report: Report, runs: Runs) -> None:
    """Item 3: every memory policy gives the adapter of the plain run, bit for bit, also while copies are slow."""
    exact = "train.deterministic=true"
    plain = runs.train("plain", *KEEP, exact)
    for name, settings in POLICIES.items():
        report.check(name, lambda n=name, s=settings: _equal(runs.train(n.replace(" ", "-"), *s, exact), plain))
    with busy_copies():
        settings = POLICIES["streamed and offloaded"]
        report.check("busy copy engine", lambda: _equal(runs.train("busy", *settings, exact), plain))


def _equal(result: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    return {**result, "right": result["adapter_sha256"] == plain["adapter_sha256"]}


class busy_copies:
    """Copies of 256 MiB queued on another stream, so that the run's own copies are late."""

    def __enter__(self) -> None:
        device = torch.device("cuda")
        self.host, self.target = host_bytes(2**28, device), torch.empty(2**28, dtype=torch.uint8, device=device)
        self.stream = CopyStream(device)
        self.stream.wait_for_compute()
        for _ in range(8):
            self.stream.copy(self.target, self.host)

    def __exit__(self, *_: Any) -> None:
        self.stream.synchronize()


def memory(report: Report, runs: Runs) -> None:
    """Item 8: a run that runs out of memory uses less of it, and goes on with the losses of the plain run."""
    exact = ("train.deterministic=true", "memory.recompute=auto")
    plain = runs.train("roomy", *exact)
    total = torch.cuda.mem_get_info()[1]

    def capped() -> dict[str, Any]:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, 0.85 * plain["peak_bytes"] / total))
        try:
            result = runs.train("capped", *exact)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        lower = result["peak_bytes"] < plain["peak_bytes"]
        same = result["losses"] == plain["losses"]
        return {**result, "plain_peak_bytes": plain["peak_bytes"], "right": lower and same}

    report.check("out of memory on purpose", capped)


def deterministic(report: Report, runs: Runs) -> None:
    """Item 9: two runs are the same in every bit; what that costs."""

    def twice() -> dict[str, Any]:
        free = runs.train("free")
        one, other = (runs.train(name, "train.deterministic=true") for name in ("one", "other"))
        seconds = {"free_seconds": free["seconds"], "deterministic_seconds": other["seconds"]}
        return {**seconds, "right": one["adapter_sha256"] == other["adapter_sha256"]}

    report.check("two runs", twice)


def large_runs(folder: Path) -> Runs:
    """Runs of a random base that fills some memory, on examples of LENGTH tokens."""
    make_base(folder / "base", SHAPE, "cuda")
    text = {"text": " ".join(f"w{number % 30_000 + 3}" for number in range(LENGTH))}
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps(text) + "\n" for _ in range(64)))
    settings = (f"data.max_length={LENGTH}", "train.max_steps=4", "optim.learning_rate=2e-4", "data.eval_fraction=0.0")
    return Runs(folder, folder / "base", data, *settings)


ITEMS = {
    "first": (first, demo_runs),
    "policies": (policies, demo_runs),
    "memory": (memory, large_runs),
    "deterministic": (deterministic, demo_runs),
}


def main() -> None:
    """Run the checks of one item."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("item", choices=ITEMS)
    item = parser.parse_args().item
    check, runs_in = ITEMS[item]
    report = Report(f"gpu-runs-{item}")
    with tempfile.TemporaryDirectory() as scratch:
        check(report, runs_in(Path(scratch)))
    report.save()


if __name__ == "__main__":
    main()
