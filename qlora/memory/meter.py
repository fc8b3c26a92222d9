"""Measured peak memory."""

import torch

from qlora.utils.devices import peak_allocated_bytes
from qlora.utils.machine import peak_resident_bytes


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a GPU, else the resident set of the process."""
    allocated = peak_allocated_bytes(device)
    return peak_resident_bytes() if allocated is None else allocated
