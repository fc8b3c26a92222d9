"""The first half hour of a GPU, in order of value: `make gpu`. Parts that have results are skipped.

Each part is a process of under nine minutes that writes its JSON check by check, so that a session that ends early
keeps its results and the next one goes on. At the end one line for each item says right or wrong.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gpu_report import verdict
from harness import RESULTS

HERE = Path(__file__).parent
BASE = Path("/tmp/qlora-random-8B")  # 16 GB, created once
PART_SECONDS = 9 * 60
RIVALS = ("--only", "ours", "ours, compiled", "ours, fused AdamW", "B1 TRL", "B2 Unsloth")  # that fit 80 GB together
SMALL = ("--only", "ours, all layers recomputed", "B1 TRL")


def speed(name: str, length: int, cap_gib: int | None = None) -> tuple[str, ...]:
    """The race of one length, on a GPU as small as `cap_gib`."""
    workload = ("--shape", "8B", "--base", str(BASE), "--batch", "1", "--length", str(length))
    cap = () if cap_gib is None else ("--cap-gib", str(cap_gib))
    return ("speed.py", "--device", "cuda", *workload, "--rounds", "10", "--warm-up", "3", *cap,
            "--name", f"gpu-speed-{name}")  # fmt: skip


class Part(NamedTuple):
    """One process: the item of the list that it answers, its command, and the allocator's setting."""

    item: str
    command: tuple[str, ...]
    allocator: str = "expandable_segments:True"
    by_name_only: bool = False


PARTS: dict[str, Part] = {
    "gpu-runs-first": Part("1 runs, second start, resume, evaluation", ("gpu_runs.py", "first")),
    "gpu-kernels-right": Part("2 kernels are right", ("gpu_kernels.py", "right")),
    "gpu-runs-policies": Part("3 policies give equal adapters", ("gpu_runs.py", "policies")),
    "gpu-speed-2048": Part("4 speed against TRL and Unsloth", (*speed("2048", 2048), *RIVALS)),
    "gpu-memory-profile": Part("4 profile", ("gpu_memory.py", "profile")),
    "gpu-memory-peaks-expandable": Part("5 memory", ("gpu_memory.py", "peaks")),
    "gpu-memory-peaks-default": Part("5 memory, default allocator", ("gpu_memory.py", "peaks"), "backend:native"),
    "gpu-kernels-rates": Part("6, 7 dequantization and copies in GB/s", ("gpu_kernels.py", "rates")),
    "gpu-speed-10gb": Part("7 speed with 10 GiB", (*speed("10gb", 2048, 10), *SMALL[:2])),
    "gpu-runs-memory": Part("8 out of memory on purpose", ("gpu_runs.py", "memory")),
    "gpu-runs-deterministic": Part("9 deterministic runs", ("gpu_runs.py", "deterministic")),
    "gpu-speed-4096": Part("speed at 4,096 tokens", (*speed("4096", 4096), *RIVALS)),
    "gpu-speed-24gb": Part("speed with 24 GiB", (*speed("24gb", 4096, 24), *SMALL)),
    "memory-gpu": Part("planned peaks in every configuration", ("memory.py", "--gpu")),
    # Managed memory beyond what is free can hang a shared GPU.
    "gpu-paging": Part("10 paged optimizer on a full GPU", ("gpu_paging.py",), by_name_only=True),
}  # fmt: skip


def missing(folder: Path = RESULTS) -> list[str]:
    """The parts without a complete result, in order."""
    return [name for name, part in PARTS.items() if not part.by_name_only and not _is_complete(folder / f"{name}.json")]


def _is_complete(path: Path) -> bool:
    if not path.exists():
        return False
    results = json.loads(path.read_text())
    return bool(results.get("complete", True)) and all(entry["right"] for entry in results.get("checks", {}).values())


def run(name: str) -> None:
    """One part, ended after PART_SECONDS."""
    script, *options = PARTS[name].command
    environment = os.environ | {"PYTORCH_ALLOC_CONF": PARTS[name].allocator}
    print(f"== {name}", flush=True)
    try:
        command = [sys.executable, str(HERE / script), *options]
        process = subprocess.run(command, timeout=PART_SECONDS, check=False, env=environment)
        print(f"== {name}: exit code {process.returncode}", flush=True)
    except subprocess.TimeoutExpired:
        print(f"== {name}: stopped after {PART_SECONDS} s; its results so far are kept", flush=True)


def summary(folder: Path = RESULTS) -> Sequence[str]:
    """One line for each part."""
    return [f"{part.item:42} {verdict(name, folder)}" for name, part in PARTS.items()]


def main() -> None:
    """Run the parts that have no complete result yet, or those named; then the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--summary", action="store_true", help="run nothing")
    options = parser.parse_args()
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    for name in () if options.summary else options.parts or missing():
        run(name)
    print("\n".join(summary()))


if __name__ == "__main__":
    main()
