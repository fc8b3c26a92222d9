"""Measured peak memory."""

import resource

import torch


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a CUDA device, else the resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
