"""4-bit dequantization on a GPU: the fused Triton kernel against bitsandbytes', in bits and GB/s."""

import time
from typing import Any

import torch
from harness import write

from qlora.quant.bitsandbytes_ops import dequantize_unfused
from qlora.quant.cuda_dequantize import Spec, dequantize_fused, random_matrix

MATRICES = {"8B query": (4096, 4096), "8B up": (14336, 4096), "70B up": (28672, 8192)}
RUNS = 50
BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 2  # codes and absmax codes read, bfloat16 written


def seconds_of(dequantize: Any, stored: list[torch.Tensor], shape: tuple[int, int], spec: Spec) -> float:
    """Seconds of one dequantization, the mean of RUNS."""
    for _ in range(5):
        dequantize(stored, shape, spec)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(RUNS):
        dequantize(stored, shape, spec)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / RUNS


def main() -> None:
    """Measure every matrix with both kernels; write results/gpu-kernels.json."""
    device, results = torch.device("cuda"), {}
    for name, shape in MATRICES.items():
        for kind in ("nf4", "fp4"):
            spec = Spec(kind, 64, torch.bfloat16)
            stored = random_matrix(shape, 64, device)[:4]
            kernels = {"ours": dequantize_fused, "theirs": dequantize_unfused}  # the keys of the results file
            seconds = {kernel: seconds_of(run, stored, shape, spec) for kernel, run in kernels.items()}
            moved_bytes = BYTES_PER_WEIGHT * shape[0] * shape[1]
            results[f"{name}, {kind}"] = {
                "equal_bits": torch.equal(
                    dequantize_fused(stored, shape, spec), dequantize_unfused(stored, shape, spec)
                ),
                **{f"{kernel}_seconds": value for kernel, value in seconds.items()},
                **{f"{kernel}_gb_per_second": moved_bytes / value / 1e9 for kernel, value in seconds.items()},
            }
            print(name, kind, results[f"{name}, {kind}"], flush=True)
    print(write("gpu-kernels", {"matrices": results}))


if __name__ == "__main__":
    main()
