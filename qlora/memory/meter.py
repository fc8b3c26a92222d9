"""Measured peaks: what a run really took, beside what was planned."""

import resource

import torch


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far: allocated on a CUDA device, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
