"""What this machine can do, and the remedy for what it can't."""

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from qlora._version import __version__
from qlora.runs.report.manifest import versions

GIB = 2**30
SHOWN = ("python", "torch", "bitsandbytes", "accelerate", "transformers")


def examine() -> dict[str, Any]:
    """Versions, devices, bitsandbytes' backend, main memory and disk in bytes, and a list of problems with remedies."""
    found = versions()
    devices = _devices()
    works, backend = _four_bit()
    disk = shutil.disk_usage(".")
    return {
        "qlora": __version__,
        **{name: found[name] for name in SHOWN},
        "platform": platform.platform(),
        "devices": devices,
        "four_bit": works,
        "bitsandbytes_backend": backend,
        "cpu_count": os.cpu_count(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "disk_free_bytes": disk.free,
        "problems": [*_problems(devices, works, backend), *_disk_problem(disk.free)],
    }


def as_lines(found: Mapping[str, Any]) -> list[str]:
    """The answer for people: what works, what does not and its remedy, and a block to paste into an issue."""
    works = [f"works    {_device_line(each)}" for each in found["devices"]]
    works.append(f"works    bitsandbytes on {found['bitsandbytes_backend']}" if found["four_bit"] else "")
    fails = [f"problem  {problem}" for problem in found["problems"]]
    named = ", ".join(f"{name} {found[name]}" for name in ("qlora", *SHOWN))
    sizes = f"{found['cpu_count']} cores, {_gib(found['ram_bytes'])} of main memory"
    block = ["```", named, f"{found['platform']}, {sizes}, {_gib(found['disk_free_bytes'])} of disk free here"]
    block += [_device_line(each) for each in found["devices"]]
    block += [f"bitsandbytes on {found['bitsandbytes_backend']}", "```"]
    return [*filter(None, works), *fails, "", "for an issue, copy from here:", *block]


def _device_line(device: Mapping[str, Any]) -> str:
    if "total_bytes" not in device:
        return f"{device['name']}, {device['threads']} thread{'s' * (device['threads'] != 1)}"
    bf16 = "bfloat16" if device["bf16"] else "no bfloat16"
    free = f"{_gib(device['free_bytes'])} of {_gib(device['total_bytes'])} free"
    return f"{device['name']}, compute capability {device['capability']}, {bf16}, {free}"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _devices() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return [{"name": "cpu", "bf16": True, "threads": torch.get_num_threads()}]
    return [_card(index) for index in range(torch.cuda.device_count())]


def _card(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = (properties.major, properties.minor)
    return {
        "name": properties.name,
        "capability": f"{capability[0]}.{capability[1]}",
        "bf16": capability >= (8, 0),
        "total_bytes": total,
        "free_bytes": free,
    }


def _four_bit() -> tuple[bool, str]:
    """Whether a matrix survives a trip through the 4-bit operators here, and on which backend."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        quantizer = import_module("qlora.quant.nf4").Nf4()
        weight = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64)
        error = (quantizer.quantize(weight).weight(torch.float32) - weight).abs().max().item()
    except (RuntimeError, ImportError, OSError, NotImplementedError) as problem:
        return False, f"{device}: {problem}"
    return error < 0.2, f"{device}: NF4 round trip off by at most {error:.3f}"


def _problems(devices: list[dict[str, Any]], works: bool, backend: str) -> list[str]:
    problems = []
    if not torch.cuda.is_available():
        problems.append("no NVIDIA card is visible: training runs on the CPU, which is for trials and tests")
    if not works:
        problems.append(f"bitsandbytes can't quantise here ({backend}): reinstall it for this version of CUDA")
    if torch.cuda.is_available() and not _pages():
        problems.append("the driver does not page here: paged optimisers stay on the card; use optim.kind=hosted_adamw")
    old = [device["name"] for device in devices if not device["bf16"]]
    if old:
        problems.append(f"{', '.join(old)}: no bfloat16; the model will compute in float32")
    return problems


def _pages() -> bool:
    """Whether managed memory moves between card and host by itself: not under Windows, WSL included."""
    return sys.platform == "linux" and "microsoft" not in platform.release().lower()


def _disk_problem(free_bytes: int) -> list[str]:
    return (
        [] if free_bytes > 20 * GIB else [f"only {free_bytes / GIB:.1f} GiB of disk are free here; a 7B base takes 14"]
    )
