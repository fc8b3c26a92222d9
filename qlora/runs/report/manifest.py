"""run.json, the manifest of a run: versions, hardware, and the sections that the run adds."""

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch

from qlora._version import __version__
from qlora.utils.machine import host_memory_bytes, package_versions


def machine(device: torch.device, processes: int) -> dict[str, Any]:
    """The hardware of a run: device name, processes, cores, bytes of memory."""
    cuda = device.type == "cuda"
    memory_bytes = host_memory_bytes()
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "device_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else memory_bytes,
        "processes": processes,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes,
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
