"""run.json: what exactly was run, on what, and how it ended."""

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from qlora._version import __version__

PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "safetensors", "datasets")


def versions() -> dict[str, str]:
    """Installed versions of Python and of the packages that a result can depend on."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def machine(device: torch.device, processes: int) -> dict[str, Any]:
    """The hardware a run used: device name, processes, cores, bytes of memory."""
    cuda = device.type == "cuda"
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "device_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else memory_bytes,
        "processes": processes,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes,
        "platform": platform.platform(),
    }


def run_manifest(parts: Mapping[str, Any], device: torch.device, processes: int) -> dict[str, Any]:
    """`parts` (base, adapter, data, result, memory, seconds, files) with versions, time and machine before them."""
    head = {
        "qlora": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine(device, processes),
    }
    return head | dict(parts)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
