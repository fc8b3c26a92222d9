"""All measurements that need a GPU, in parts of under nine minutes: `make gpu`. Parts that have results are skipped.

Each part is a separate process and writes its JSON as it goes, so that an interrupted session keeps its results.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from harness import RESULTS

HERE = Path(__file__).parent
BASE = Path("/tmp/qlora-random-8B")  # 16 GB, created once
PART_SECONDS = 9 * 60
SPEED = ("speed.py", "--device", "cuda", "--shape", "8B", "--base", str(BASE), "--batch", "1", "--rounds", "10",
         "--warm-up", "3", "--name")  # fmt: skip
PARTS: dict[str, tuple[str, ...]] = {
    "gpu-kernels": ("kernels.py",),
    "gpu-speed-2048": (*SPEED, "gpu-speed-2048", "--length", "2048"),
    "gpu-speed-4096": (*SPEED, "gpu-speed-4096", "--length", "4096"),
    "gpu-speed-24gb": (*SPEED, "gpu-speed-24gb", "--length", "4096", "--cap-gib", "24"),
    "memory-gpu": ("memory.py", "--gpu"),
}


def main() -> None:
    """Run the parts that have no results yet, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    names = parser.parse_args().parts or [name for name in PARTS if not (RESULTS / f"{name}.json").exists()]
    for name in names:
        print(f"== {name}", flush=True)
        script, *options = PARTS[name]
        try:
            process = subprocess.run([sys.executable, str(HERE / script), *options], timeout=PART_SECONDS, check=False)
            print(f"== {name}: exit code {process.returncode}", flush=True)
        except subprocess.TimeoutExpired:
            print(f"== {name}: stopped after {PART_SECONDS} s; its results so far are kept", flush=True)


if __name__ == "__main__":
    main()
