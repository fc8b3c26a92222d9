"""An out-of-memory error is recognized in every form in which it is reported, and nothing else is."""

import pytest
import torch

from qlora.utils.out_of_memory import is_out_of_memory


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("NCCL error: ncclUnhandledCudaError: Failed to CUDA calloc: cudaErrorMemoryAllocation"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
], ids=str)  # fmt: skip
def test_every_form_is_recognized(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    ValueError("out of memory is a word in this message"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
], ids=str)  # fmt: skip
def test_other_errors_are_not(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_cpu_allocation_that_cannot_succeed_is_recognized() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
