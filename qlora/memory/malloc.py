"""Settings of glibc's allocator: return freed memory to the system while a base model loads, keep it while training."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
MMAP_BYTES = 2**20  # while a base model loads, larger allocations are mappings of their own
LARGEST_MMAP_BYTES = 32 * 2**20  # the largest threshold that glibc accepts
NEVER = 2**31 - 1  # bytes free at the end of the heap before it is trimmed


def return_freed_memory() -> bool:
    """Map every allocation from 1 MiB on separately, so that freeing it unmaps it. False without glibc.

    Otherwise the 16-bit tensors that were read would stay in glibc's heaps, one heap per thread.
    """
    return _set(MMAP_BYTES, MMAP_BYTES)


def keep_freed_memory() -> bool:
    """Take tensors up to 32 MiB from the heap, and never trim the heap. False without glibc.

    Otherwise every step gets the same pages from the system again: up to half of a step's time on a virtual machine.
    """
    return _set(LARGEST_MMAP_BYTES, NEVER)


def _set(mmap_bytes: int, trim_bytes: int) -> bool:
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, mmap_bytes) and mallopt(M_TRIM_THRESHOLD, trim_bytes))
