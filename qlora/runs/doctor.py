"""`qlora doctor`: versions, devices, memory and disk of this machine; problems with a remedy for each."""

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import torch

from qlora._version import __version__
from qlora.quant import Quant, build_quantizer
from qlora.utils.machine import GIB, gib, host_memory_bytes, package_versions

SHOWN = ("python", "torch", "bitsandbytes", "accelerate", "transformers")


def examine_machine() -> dict[str, Any]:
    """The object of `doctor --json`: versions, devices, bitsandbytes backend, memory and disk in bytes, problems."""
    versions = package_versions()
    devices = _devices()
    works, backend = _four_bit()
    disk = shutil.disk_usage(".")
    return {
        "qlora": __version__,
        **{name: versions[name] for name in SHOWN},
        "platform": platform.platform(),
        "devices": devices,
        "four_bit": works,
        "bitsandbytes_backend": backend,
        "cpu_count": os.cpu_count(),
        "ram_bytes": host_memory_bytes(),
        "disk_free_bytes": disk.free,
        "problems": [*_problems(devices, works, backend), *_disk_problem(disk.free)],
    }


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The report as text: what works, each problem with its remedy, and a block to paste into an issue."""
    works = [f"works    {_device_line(device)}" for device in report["devices"]]
    works.append(f"works    bitsandbytes on {report['bitsandbytes_backend']}" if report["four_bit"] else "")
    problems = [f"problem  {problem}" for problem in report["problems"]]
    versions = ", ".join(f"{name} {report[name]}" for name in ("qlora", *SHOWN))
    sizes = f"{report['cpu_count']} cores, {gib(report['ram_bytes'])} of host memory"
    block = ["```", versions, f"{report['platform']}, {sizes}, {gib(report['disk_free_bytes'])} of disk free here"]
    block += [_device_line(device) for device in report["devices"]]
    block += [f"bitsandbytes on {report['bitsandbytes_backend']}", "```"]
    return [*filter(None, works), *problems, "", "for an issue, copy from here:", *block]


def _device_line(device: Mapping[str, Any]) -> str:
    if "total_bytes" not in device:
        return f"{device['name']}, {device['threads']} thread{'s' * (device['threads'] != 1)}"
    bf16 = "bfloat16" if device["bf16"] else "no bfloat16"
    free = f"{gib(device['free_bytes'])} of {gib(device['total_bytes'])} free"
    return f"{device['name']}, compute capability {device['capability']}, {bf16}, {free}"


def _devices() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return [{"name": "cpu", "bf16": True, "threads": torch.get_num_threads()}]
    return [_gpu(index) for index in range(torch.cuda.device_count())]


def _gpu(index: int) -> dict[str, Any]:
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
    """Whether a matrix can be quantized to 4 bits and back on this machine, and on which backend."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        quantizer = build_quantizer(Quant())
        weight = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64)
        error = (quantizer.quantize(weight).weight(torch.float32) - weight).abs().max().item()
    except (RuntimeError, ImportError, OSError, NotImplementedError) as problem:
        return False, f"{device}: {problem}"
    return error < 0.2, f"{device}: NF4 round trip off by at most {error:.3f}"


def _problems(devices: list[dict[str, Any]], works: bool, backend: str) -> list[str]:
    problems = []
    if not torch.cuda.is_available():
        problems.append(
            "no NVIDIA GPU is visible: training runs on the CPU, which is slow; use it for trials and tests"
        )
    if not works:
        problems.append(f"bitsandbytes can't quantize here ({backend}): reinstall it for this version of CUDA")
    if torch.cuda.is_available() and not _pages():
        problems.append(
            "the driver has no managed memory paging: paged optimizers stay on the GPU; use optim.kind=offloaded_adamw"
        )
    old = [device["name"] for device in devices if not device["bf16"]]
    if old:
        problems.append(f"{', '.join(old)}: no bfloat16; the model computes in float32")
    return problems


def _pages() -> bool:
    """Whether the driver pages managed memory between GPU and host: not under Windows or WSL."""
    return sys.platform == "linux" and "microsoft" not in platform.release().lower()


def _disk_problem(free_bytes: int) -> list[str]:
    return (
        []
        if free_bytes > 20 * GIB
        else [f"only {free_bytes / GIB:.1f} GiB of disk are free here; a 7B base model needs 14"]
    )
