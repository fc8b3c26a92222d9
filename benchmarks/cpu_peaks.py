"""CPU runs against their plan: peak memory measured and planned of whole runs of `qlora train`: python cpu_peaks.py.

Random Llamas of three sizes, everything kept and everything recomputed, one thread, each run a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import write

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
SIZES = ("30M", "100M", "250M")
RECOMPUTE = ("none", "all")
ROWS, LENGTH, BATCH, STEPS = 16, 512, 4, 3
MAKE = """
import json, sys
from pathlib import Path
from workloads import make_base, rows_of
folder, size, rows, length = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
make_base(folder, size, "cpu")
lines = [json.dumps({"input_ids": ids, "labels": ids}) for ids in rows_of(rows, length, short=False)]
(folder / "rows.jsonl").write_text("\\n".join(lines) + "\\n")
"""


def prepare(folder: Path, size: str) -> None:
    """A base and its rows, made in a process of its own: a child may count its parent's memory as its own."""
    if not (folder / "rows.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        python("-c", MAKE, str(folder), size, str(ROWS), str(LENGTH))


def measured(base: Path, recompute: str, out: Path) -> dict[str, Any]:
    """Planned and measured bytes of one run."""
    recipe = out.with_suffix(".yaml")
    recipe.write_text(json.dumps({  # JSON is YAML
        "model": str(base),
        "data": {"train": str(base / "rows.jsonl"), "max_length": LENGTH, "eval_fraction": 0.0},
        "train": {"output": str(out), "micro_batch": BATCH, "global_batch": BATCH, "max_steps": STEPS},
        "memory": {"recompute": recompute},
    }))  # fmt: skip
    python("-m", "qlora", "train", str(recipe))
    found: dict[str, Any] = json.loads((out / "run.json").read_text())["memory"]
    return found


def python(*words: str) -> None:
    """One thread, this repository first on the path; SystemExit with what it said if it fails."""
    path = f"{ROOT}{os.pathsep}{HERE}"
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *words], check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)


def main() -> None:
    """Run, and write results/cpu_peaks.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=SIZES)
    parser.add_argument("--keep", type=Path, help="where bases and runs stay; a temporary folder if not said")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        for size in options.sizes:
            prepare(folder / size, size)
            for recompute in RECOMPUTE:
                found = measured(folder / size, recompute, Path(scratch) / f"{size}-{recompute}")
                runs.append({"size": size, "recompute": recompute, **found})
                planned, peak = found["planned_bytes"], found["peak_bytes"]
                print(f"{size} {recompute}: planned {planned / 2**20:,.0f} MiB, measured {peak / 2**20:,.0f} MiB, "
                      f"{100 * (planned / peak - 1):+.1f} %", flush=True)  # fmt: skip
    print(write("cpu_peaks", {"rows": BATCH, "length": LENGTH, "steps": STEPS, "runs": runs}))


if __name__ == "__main__":
    main()
