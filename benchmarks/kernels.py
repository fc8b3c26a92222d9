"""Dequantisation on a card: our fused kernel against bitsandbytes', bits and GB/s: python benchmarks/kernels.py."""

import time
from typing import Any

import torch
from bench import write

from qlora.quant.bitsandbytes_ops import _dequantize
from qlora.quant.cuda_dequantize import Form, _ours, random_matrix

MATRICES = {"8B query": (4096, 4096), "8B up": (14336, 4096), "70B up": (28672, 8192)}
RUNS = 50
BYTES_A_WEIGHT = 0.5 + 1 / 64 + 2  # codes and absmax codes read, bfloat16 written


def seconds_of(rebuild: Any, stored: list[torch.Tensor], shape: tuple[int, int], form: Form) -> float:
    """One rebuilding, over RUNS of them."""
    for _ in range(5):
        rebuild(stored, shape, form)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(RUNS):
        rebuild(stored, shape, form)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / RUNS


def main() -> None:
    """Every matrix, both kernels, results/gpu-kernels.json."""
    device, found = torch.device("cuda"), {}
    for name, shape in MATRICES.items():
        for kind in ("nf4", "fp4"):
            form = Form(kind, 64, torch.bfloat16)
            stored = random_matrix(shape, 64, device)[:4]
            seconds = {who: seconds_of(f, stored, shape, form) for who, f in (("ours", _ours), ("theirs", _dequantize))}
            moved = BYTES_A_WEIGHT * shape[0] * shape[1]
            found[f"{name}, {kind}"] = {
                "equal_bits": torch.equal(_ours(stored, shape, form), _dequantize(stored, shape, form)),
                **{f"{who}_seconds": each for who, each in seconds.items()},
                **{f"{who}_gb_per_second": moved / each / 1e9 for who, each in seconds.items()},
            }
            print(name, kind, found[f"{name}, {kind}"], flush=True)
    print(write("gpu-kernels", {"matrices": found}))


if __name__ == "__main__":
    main()
