"""The machine: host memory, installed package versions, sizes in GiB. The module that imports psutil.

Imports no torch, so that `qlora plan` and `qlora check` start without it.
"""

import os
import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import psutil

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

GIB = 2**30
MIB = 2**20
PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "safetensors", "datasets")


def host_memory_bytes() -> int:
    """All host memory, in bytes."""
    if hasattr(os, "sysconf"):  # not on Windows
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(psutil.virtual_memory().total)


def peak_resident_bytes() -> int:
    """The largest resident set of this process so far, in bytes."""
    if resource is None:
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def package_versions() -> dict[str, str]:
    """Installed versions of Python and of the packages that a result can depend on."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


@cache  # it parses the package's metadata: 4 ms
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
