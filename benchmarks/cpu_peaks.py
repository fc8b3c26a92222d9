"""Planned against measured peak memory of whole runs of `qlora train` on a CPU: python benchmarks/cpu_peaks.py.

Random Llamas of three sizes, with no, half or all layers recomputed, and several sequence lengths; a mixture of experts
and a hybrid, in float32, with no or all layers recomputed. One thread; each run in a new process. The constants for the
CPU's heap in memory/planner/ were fitted to the runs of 4 x 512 tokens of Llamas and of the mixture of experts, with no
or all layers recomputed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import write
from workloads import SHAPES

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
OTHER = ("moe", "hybrid")
SIZES = ("30M", "100M", "250M", *OTHER)
EXAMPLES, STEPS = 24, 3
MAKE = """
import json, sys
from pathlib import Path
from workloads import make_base, token_lists
folder, size, count, length = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
make_base(folder, size, "cpu")
lines = [json.dumps({"input_ids": ids, "labels": ids}) for ids in token_lists(count, length, short=False)]
(folder / f"rows-{length}.jsonl").write_text("\\n".join(lines) + "\\n")
"""


@dataclass(frozen=True)
class Run:
    """One run: how many layers recompute, and a micro-batch of `rows` x `length` tokens."""

    size: str
    recompute: int
    rows: int = 4
    length: int = 512

    def __str__(self) -> str:
        return f"{self.size}, {self.recompute} layers recomputed, {self.rows} x {self.length} tokens"


def runs_of(size: str) -> list[Run]:
    """No, half and all layers recomputed; for one size with other micro-batches too."""
    layers = SHAPES[size]["num_hidden_layers"]
    if size in OTHER:
        return [Run(size, recompute) for recompute in (0, layers)]
    runs = [Run(size, recompute) for recompute in (0, layers // 2, layers)]
    if size == "100M":
        runs += [Run(size, recompute, rows, 2048 // rows) for rows in (1, 8) for recompute in (0, layers)]
    return runs


def measured(folder: Path, run: Run, scratch: Path) -> dict[str, Any]:
    """Planned and measured bytes of one run; base and data are created in `folder` if they are missing."""
    base = folder / run.size
    data, out = base / f"rows-{run.length}.jsonl", scratch / f"{run.size}-{run.recompute}-{run.rows}"
    if not data.exists():  # in a new process: a child's peak may include its parent's memory
        base.mkdir(parents=True, exist_ok=True)
        python("-c", MAKE, str(base), run.size, str(EXAMPLES), str(run.length))
    recipe = out.with_suffix(".yaml")
    recipe.write_text(json.dumps({  # JSON is YAML
        "model": {"name": str(base), "dtype": "float32" if run.size in OTHER else "auto"},
        "data": {"train": str(data), "max_length": run.length, "eval_fraction": 0.0},
        "train": {"output": str(out), "micro_batch": run.rows, "global_batch": run.rows, "max_steps": STEPS},
        "memory": {"recompute": run.recompute},
    }))  # fmt: skip
    python("-m", "qlora", "train", str(recipe))
    memory: dict[str, Any] = json.loads((out / "run.json").read_text())["memory"]
    return asdict(run) | memory


def python(*arguments: str) -> None:
    """Run Python with one thread and this repository first on its path; SystemExit with its stderr if it fails."""
    path = f"{ROOT}{os.pathsep}{HERE}"
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run([sys.executable, *arguments], check=False, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(process.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all runs and write results/cpu_peaks.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=SIZES)
    parser.add_argument("--keep", type=Path, help="folder that keeps the bases; default: a temporary folder")
    options = parser.parse_args(arguments)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for run in (run for size in options.sizes for run in runs_of(size)):
            results.append(measured(options.keep or Path(scratch), run, Path(scratch)))
            planned, peak = results[-1]["planned_bytes"], results[-1]["peak_bytes"]
            print(f"{run}: planned {planned / 2**20:,.0f} MiB, measured {peak / 2**20:,.0f} MiB, "
                  f"{100 * (planned / peak - 1):+.1f} %", flush=True)  # fmt: skip
    path = HERE / "results" / "cpu_peaks.json"
    others = json.loads(path.read_text())["runs"] if path.exists() else []
    others = [run for run in others if run["size"] not in options.sizes]
    print(write("cpu_peaks", {"steps": STEPS, "runs": others + results}))


if __name__ == "__main__":
    main()
