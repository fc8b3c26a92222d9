"""What a run costs in energy: the counter of the card, asked before and after, where the driver tells it.

NVML is the driver's own library, so nothing has to be installed: nvmlDeviceGetTotalEnergyConsumption, in millijoules
since the driver was loaded, for the whole card (Volta and later).  docs.nvidia.com/deploy/nvml-api
"""

import ctypes
from typing import Any

import torch

LIBRARY = "libnvidia-ml.so.1"


def energy_joules(device: torch.device) -> float | None:
    """The card's energy counter in joules; None for a CPU, and for a card or driver that does not tell."""
    if device.type != "cuda":
        return None
    try:
        library = ctypes.CDLL(LIBRARY)
        return _counter(library, f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except (OSError, AttributeError):  # no such library, or an older one without the function
        return None


def _counter(library: Any, uuid: str) -> float | None:
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    if library.nvmlInit_v2():
        return None
    try:
        found = library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) == 0
        told = found and library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)) == 0
        return millijoules.value / 1000 if told else None
    finally:
        library.nvmlShutdown()
