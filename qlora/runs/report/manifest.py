"""run.json, the manifest of a run: versions, hardware, and the sections that the run adds."""

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch

from qlora._version import __version__
from qlora.utils.devices import device_name, memory_bytes
from qlora.utils.machine import host_memory_bytes, package_versions


def machine(device: torch.device, processes: int) -> dict[str, Any]:
    """The hardware of a run: device name, processes, cores, bytes of memory."""
    host_bytes, device_bytes = host_memory_bytes(), memory_bytes(device)
    return {
        "device": device_name(device),
        "device_bytes": host_bytes if device_bytes is None else device_bytes[1],
        "processes": processes,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": host_bytes,
        "platform": platform.platform(),
    }


def run_manifest(content: Mapping[str, Any], device: torch.device, processes: int) -> dict[str, Any]:
    """`content` (base, adapter, data, result, memory, seconds, files) after versions, time and machine."""
    head = {
        "qlora": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
        "machine": machine(device, processes),
    }
    return head | dict(content)
