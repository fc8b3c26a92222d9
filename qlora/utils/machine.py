"""The machine: host memory, installed package versions, sizes in GiB.

Imports no torch, so that `qlora plan` and `qlora check` start without it.
"""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

GIB = 2**30
MIB = 2**20
PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "safetensors", "datasets")


def host_memory_bytes() -> int:
    """All host memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def package_versions() -> dict[str, str]:
    """Installed versions of Python and of the packages that a result can depend on."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def gib(size_bytes: float, digits: int = 1) -> str:
    """`7.4 GiB`."""
    return f"{size_bytes / GIB:.{digits}f} GiB"


def gib_or_mib(size_bytes: float) -> str:
    """`7.40 GiB`; sizes below a tenth of that unit as `12.00 MiB`."""
    return gib(size_bytes, 2) if size_bytes >= GIB // 10 else f"{size_bytes / MIB:.2f} MiB"
