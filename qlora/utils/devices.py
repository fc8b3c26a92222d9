"""Devices: which one a run uses, and what it has. The only place that asks CUDA, ROCm, XPU or MPS such questions.

ROCm builds of torch answer as "cuda". XPU and MPS are prepared, and were never run: QLORA_DEVICE=xpu or mps takes them.
"""

import os
from types import ModuleType

import torch

from qlora.errors import InputError

GPU_TYPES = ("cuda", "xpu", "mps")
VARIABLE = "QLORA_DEVICE"  # environment variable: the device type of a run
BFLOAT16_CAPABILITY = (8, 0)  # of NVIDIA GPUs: Ampere


def same_device(first: torch.device, second: torch.device) -> bool:
    """`cuda` and `cuda:0` are the same for a process, which uses one GPU: only tensors always have an index.

    Devices of one type with different indices differ.
    """
    if first.type != second.type:
        return False
    return first.index is None or second.index is None or first.index == second.index


def available_gpus() -> list[str]:
    """The types of GPU that this build of torch sees here, the preferred one first."""
    return [kind for kind in GPU_TYPES if _backend(kind) is not None and _backend(kind).is_available()]  # type: ignore[union-attr]


def device_type() -> str:
    """The device type of a run: QLORA_DEVICE if it is set, else cuda if there is one, else cpu.

    InputError if QLORA_DEVICE names a device that is not here.
    """
    allowed, choice = [*available_gpus(), "cpu"], os.environ.get(VARIABLE, "").strip().lower()
    if choice and choice not in allowed:
        raise InputError(f"{VARIABLE}={choice}: not a device of this machine. Allowed here: {', '.join(allowed)}.")
    return choice or ("cuda" if "cuda" in allowed else "cpu")


def run_device() -> torch.device:
    """The device of a run with one process. InputError as in `device_type`."""
    return torch.device(device_type())


def device_count(kind: str) -> int:
    """The number of devices of a type; 1 for a CPU."""
    backend = _backend(kind)
    return 1 if backend is None or kind == "mps" else int(backend.device_count())


def device_name(device: torch.device) -> str:
    """The name of a GPU as its driver gives it; `cpu` or `mps` for these."""
    backend = _backend(device.type)
    return device.type if backend is None or device.type == "mps" else str(backend.get_device_name(device))


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU (what ROCm reports under this name for an AMD one), else None."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 in hardware (NVIDIA: compute capability 8.0 on; CPUs always, if slowly)."""
    if device.type == "cuda" and torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY
    backend = _backend(device.type)
    supported = getattr(backend, "is_bf16_supported", None)
    return bool(supported()) if supported else True


def memory_bytes(device: torch.device) -> tuple[int, int] | None:
    """Free and total bytes of a GPU; None for a CPU. Creates the device's context."""
    if device.type == "mps":
        total = int(torch.mps.recommended_max_memory())
        return total - int(torch.mps.driver_allocated_memory()), total
    backend = _backend(device.type)
    return None if backend is None else backend.mem_get_info(device)


def peak_allocated_bytes(device: torch.device) -> int | None:
    """The most bytes of tensors that were on a GPU at a time; None where the device does not count them."""
    if device.type in ("cuda", "xpu"):
        return int(_backend(device.type).max_memory_allocated(device))  # type: ignore[union-attr]
    return int(torch.mps.driver_allocated_memory()) if device.type == "mps" else None


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that was queued."""
    backend = _backend(device.type)
    if backend is not None:
        backend.synchronize()


def release_cache(device: torch.device) -> None:
    """Wait for a GPU, then give the allocator's unused memory back to it; nothing to do on a CPU."""
    backend = _backend(device.type)
    if backend is not None:
        backend.synchronize()
        backend.empty_cache()


def _backend(kind: str) -> ModuleType | None:
    """torch.cuda, torch.xpu or torch.mps; None for a CPU, or where torch was built without it."""
    return getattr(torch, kind, None) if kind in GPU_TYPES else None
