"""Measured peak memory."""

import torch

from qlora.utils.machine import peak_resident_bytes


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a CUDA device, else the resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()
