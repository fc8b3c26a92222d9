"""The C library's allocator: what reading a base frees goes back to the system, what a step frees is kept."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
MAPPED_FROM = 2**20  # bytes from which an allocation is a mapping of its own, while a base is read
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # bytes; glibc takes no larger one
NEVER = 2**31 - 1  # bytes free at the heap's end before they are given back


def return_freed_memory() -> bool:
    """Let glibc map every allocation from 1 MiB on by itself and unmap it when freed; False where there is no glibc.

    Else the 16-bit tensors that passed through would stay in its heaps, one for each thread.
    """
    return _set(MAPPED_FROM, MAPPED_FROM)


def keep_freed_memory() -> bool:
    """Let glibc take tensors up to 32 MiB from its heap and never give the heap back; False where there is no glibc.

    Else every step asks the system for the same pages again: up to half of a step's time on a virtual machine.
    """
    return _set(LARGEST_MMAP_THRESHOLD, NEVER)


def _set(mapped_from: int, trimmed_from: int) -> bool:
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, mapped_from) and mallopt(M_TRIM_THRESHOLD, trimmed_from))
