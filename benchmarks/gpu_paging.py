"""Item 10, by name only: bitsandbytes' paged moments while the GPU is full. Writes results/gpu-paging.json.

Never on a shared GPU: managed memory beyond what is free can hang it.
"""

import time
from typing import Any

import torch
from bitsandbytes.optim.adamw import PagedAdamW32bit
from gpu_report import Report

VALUES, TENSORS, LEFT_BYTES = 2**24, 16, 2**28


def main() -> None:
    """Seconds of a step with free memory, and with LEFT_BYTES of it."""
    report = Report("gpu-paging")
    report.check("paged moments give way", full_gpu)
    report.save()


def full_gpu() -> dict[str, Any]:
    """Right if ordinary memory can be allocated while the moments, which were on the GPU, give way."""
    parameters = [torch.nn.Parameter(torch.zeros(VALUES, device="cuda")) for _ in range(TENSORS)]
    optimizer = PagedAdamW32bit(parameters)
    free = [step(optimizer, parameters) for _ in range(3)][-1]
    rest = torch.cuda.mem_get_info()[0] - LEFT_BYTES
    ballast = torch.empty(max(0, rest), dtype=torch.uint8, device="cuda")
    full = [step(optimizer, parameters) for _ in range(3)][-1]
    return {"free_seconds": free, "full_seconds": full, "ballast_bytes": ballast.numel(), "right": full < 20 * free}


def step(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> float:
    """Seconds of one optimizer step."""
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.cuda.synchronize()
    started = time.perf_counter()
    optimizer.step()
    torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
