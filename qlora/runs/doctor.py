"""`qlora doctor`: versions, devices, memory and disk of this machine; problems with a remedy for each.

Each device proves an NF4 round trip and training steps in its dtypes (device_proof.py).
"""

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import torch

from qlora._version import __version__
from qlora.runs.device_proof import prove
from qlora.utils.devices import (
    VARIABLE,
    available_gpus,
    capability,
    device_count,
    device_name,
    device_type,
    has_bfloat16,
    memory_bytes,
)
from qlora.utils.machine import GIB, gib, host_memory_bytes, package_versions

SHOWN = ("python", "torch", "bitsandbytes", "accelerate", "transformers")


def examine_machine() -> dict[str, Any]:
    """The object of `doctor --json`: versions, devices, bitsandbytes backend, memory and disk in bytes, problems."""
    versions, devices = package_versions(), _devices()
    four_bit = devices[0]["proofs"][0]
    disk = shutil.disk_usage(".")
    return {
        "qlora": __version__,
        **{name: versions[name] for name in SHOWN},
        "platform": platform.platform(),
        "devices": devices,
        "four_bit": four_bit["works"],
        "bitsandbytes_backend": f"{devices[0]['type']}: {four_bit['result']}",
        "cpu_count": os.cpu_count(),
        "ram_bytes": host_memory_bytes(),
        "disk_free_bytes": disk.free,
        "problems": [*_problems(devices), *_disk_problem(disk.free)],
    }


def computes(report: Mapping[str, Any]) -> bool:
    """Whether every device computes what it should; if not, `qlora doctor` exits with code 1."""
    return all(proof["works"] for device in report["devices"] for proof in device["proofs"])


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The report as text: what works, each problem with its remedy, and a block to paste into an issue."""
    works = [f"works    {_device_line(device)}" for device in report["devices"]]
    proofs = [(device, proof) for device in report["devices"] for proof in device["proofs"] if proof["works"]]
    works += [f"works    {proof['name']} on {device['name']}: {proof['result']}" for device, proof in proofs]
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
    level = f"compute capability {device['capability']}, " if device["capability"] else ""
    return f"{device['name']}, {level}{bf16}, {free}"


def _devices() -> list[dict[str, Any]]:
    """The devices of a run's type: every GPU, or the CPU."""
    kind = device_type()
    if kind == "cpu":
        return [_device(torch.device(kind)) | {"threads": torch.get_num_threads()}]
    return [_device(torch.device(kind, index)) for index in range(device_count(kind))]


def _device(device: torch.device) -> dict[str, Any]:
    proofs = [proof.as_json() for proof in prove(device)]
    content = {"type": device.type, "name": device_name(device), "bf16": has_bfloat16(device), "proofs": proofs}
    memory, level = memory_bytes(device), capability(device)
    if memory is None:
        return content
    version = ".".join(map(str, level)) if level else None
    return content | {"capability": version, "free_bytes": memory[0], "total_bytes": memory[1]}


def _problems(devices: list[dict[str, Any]]) -> list[str]:
    problems, kind = [], devices[0]["type"]
    if kind == "cpu":
        others = [gpu for gpu in available_gpus() if gpu != kind]
        hint = f"; {others[0]} is prepared, and was never run: {VARIABLE}={others[0]} takes it" if others else ""
        problems.append(
            f"no NVIDIA or AMD GPU is used: training runs on the CPU, which is slow; use it for trials and tests{hint}"
        )
    for device in devices:
        failed = [f"{proof['name']}: {proof['result']}" for proof in device["proofs"] if not proof["works"]]
        if failed:
            problems.append(
                f"{device['name']} does not compute what it should ({'; '.join(failed)}): do not train on it; update "
                "its driver, and reinstall torch and bitsandbytes for it"
            )
    if kind == "cuda" and not _pages():
        problems.append(
            "the driver has no managed memory paging: paged optimizers stay on the GPU; use optim.kind=offloaded_adamw"
        )
    old = [device["name"] for device in devices if not device["bf16"]]
    if old:
        problems.append(f"{', '.join(old)}: no bfloat16; a 16-bit base computes in float16, with loss scaling")
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
