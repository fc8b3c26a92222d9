"""The C library's allocator on a CPU run: freed tensors stay with the process, to be used again in the next step."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # bytes; glibc takes no larger one
NEVER = 2**31 - 1  # bytes free at the heap's end before they are given back


def keep_freed_memory() -> bool:
    """Let glibc take tensors up to 32 MiB from its heap and never give the heap back; False where there is no glibc.

    Else every step asks the system for the same pages again: up to half of a step's time on a virtual machine.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, NEVER))
