"""Recognize an out-of-memory error in every form in which torch and the GPU's libraries report it. Imports no torch."""

ERROR_TYPES = ("OutOfMemoryError", "MemoryError")  # torch's, and Python's
# In the text of a RuntimeError: the CUDA runtime, Triton and NCCL; cuBLAS and cuDNN; torch's allocator on a CPU.
TEXTS = ("out of memory", "ALLOC_FAILED", "cudaErrorMemoryAllocation", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated."""
    if type(error).__name__ in ERROR_TYPES:
        return True
    return isinstance(error, RuntimeError) and any(text.lower() in str(error).lower() for text in TEXTS)
