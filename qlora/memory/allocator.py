"""The C library's allocator on a CPU run: freed tensors go back to the system, so that the plan holds."""

import ctypes

M_MMAP_THRESHOLD = -3  # malloc.h of glibc
MAPPED_FROM = 2**20  # bytes from which an allocation is a mapping of its own


def return_freed_memory() -> bool:
    """Let glibc map every allocation from 1 MiB on by itself and unmap it when freed; False where there is no glibc.

    Else freed activations stay in its heaps, one of forward's thread and one of backward's: up to a quarter more.
    """
    try:
        return bool(ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, MAPPED_FROM))
    except (OSError, AttributeError):
        return False
