"""CPU runs against their plan: peak memory measured and planned of whole runs of `qlora train`: python cpu_peaks.py.

Random Llamas of three sizes, layers kept, half and all recomputed, rows of other lengths, one thread, each run a
process of its own. What memory/owners.py says of a CPU's heap was fitted to the runs of 4 x 512 tokens with no or all
layers recomputed.
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

from bench import write
from workloads import SHAPES

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
SIZES = ("30M", "100M", "250M")
ROWS, STEPS = 24, 3
MAKE = """
import json, sys
from pathlib import Path
from workloads import make_base, rows_of
folder, size, rows, length = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
make_base(folder, size, "cpu")
lines = [json.dumps({"input_ids": ids, "labels": ids}) for ids in rows_of(rows, length, short=False)]
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
    """None, half and all of the layers recomputed; for one size in other shapes too."""
    layers = SHAPES[size]["num_hidden_layers"]
    found = [Run(size, recompute) for recompute in (0, layers // 2, layers)]
    if size == "100M":
        found += [Run(size, recompute, rows, 2048 // rows) for rows in (1, 8) for recompute in (0, layers)]
    return found


def measured(folder: Path, run: Run, scratch: Path) -> dict[str, Any]:
    """Planned and measured bytes of one run; its base and rows are made in `folder` if they are not there."""
    base = folder / run.size
    rows, out = base / f"rows-{run.length}.jsonl", scratch / f"{run.size}-{run.recompute}-{run.rows}"
    if not rows.exists():  # in a process of its own: a child may count its parent's memory as its own
        base.mkdir(parents=True, exist_ok=True)
        python("-c", MAKE, str(base), run.size, str(ROWS), str(run.length))
    recipe = out.with_suffix(".yaml")
    recipe.write_text(json.dumps({  # JSON is YAML
        "model": str(base),
        "data": {"train": str(rows), "max_length": run.length, "eval_fraction": 0.0},
        "train": {"output": str(out), "micro_batch": run.rows, "global_batch": run.rows, "max_steps": STEPS},
        "memory": {"recompute": run.recompute},
    }))  # fmt: skip
    python("-m", "qlora", "train", str(recipe))
    found: dict[str, Any] = json.loads((out / "run.json").read_text())["memory"]
    return asdict(run) | found


def python(*words: str) -> None:
    """One thread, this repository first on the path; SystemExit with what it said if it fails."""
    path = f"{ROOT}{os.pathsep}{HERE}"
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *words], check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)


def main(words: Sequence[str] | None = None) -> None:
    """Run, and write results/cpu_peaks.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=SIZES)
    parser.add_argument("--keep", type=Path, help="where bases stay; a temporary folder if not said")
    options = parser.parse_args(words)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for run in (run for size in options.sizes for run in runs_of(size)):
            found.append(measured(options.keep or Path(scratch), run, Path(scratch)))
            planned, peak = found[-1]["planned_bytes"], found[-1]["peak_bytes"]
            print(f"{run}: planned {planned / 2**20:,.0f} MiB, measured {peak / 2**20:,.0f} MiB, "
                  f"{100 * (planned / peak - 1):+.1f} %", flush=True)  # fmt: skip
    print(write("cpu_peaks", {"steps": STEPS, "runs": found}))


if __name__ == "__main__":
    main()
