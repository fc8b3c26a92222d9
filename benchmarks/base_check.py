"""Seconds of the start-up comparison on the demo's base; writes results/base_check.json."""

import statistics
import time
from pathlib import Path

import torch
from harness import write

import qlora
from qlora.model import Model
from qlora.model.load_base import load
from qlora.quant import Quant, build_quantizer
from qlora.training.base_check import check_base

RUNS = 9


def main() -> None:
    """Compare the demo's base RUNS times, after one run to warm up."""
    folder = Path(qlora.__file__).parent / "demo" / "base"
    base = load(Model(name=str(folder), dtype="float32"), build_quantizer(Quant()), torch.device("cpu"))
    seconds = []
    for _ in range(RUNS + 1):
        started = time.monotonic()
        check_base(base.model, lambda line: None)
        seconds.append(time.monotonic() - started)
    write("base_check", {"kind": "measured", "runs": RUNS, "median_seconds": round(statistics.median(seconds[1:]), 3)})


if __name__ == "__main__":
    main()
