"""Energy used by a GPU: the driver's counter, read before and after a run.

NVML is part of the driver, so nothing has to be installed: nvmlDeviceGetTotalEnergyConsumption gives millijoules since
the driver was loaded, for the whole GPU (Volta and later). Source: docs.nvidia.com/deploy/nvml-api
"""

import ctypes
from typing import Any

import torch

LIBRARY = "libnvidia-ml.so.1"


def energy_joules(device: torch.device) -> float | None:
    """The GPU's energy counter in joules; None on a CPU, and for a GPU or driver without a counter."""
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
        if library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) != 0:
            return None
        if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)) != 0:
            return None
        return millijoules.value / 1000
    finally:
        library.nvmlShutdown()
