"""Pinned host memory: whole pages, registered as long as any view of it is alive, and released after the last."""

import gc
from itertools import pairwise
from typing import Any

import pytest
import torch

from qlora.errors import QloraError
from qlora.memory.copy_stream import PAGE_BYTES, host_bytes

CUDA = torch.device("cuda")


class Driver:
    """Stands in for the CUDA runtime of a machine without one: records what is registered."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.registered = status, dict[int, int]()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.registered[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> None:
        del self.registered[address]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    return driver


@pytest.mark.parametrize("size", [1, PAGE_BYTES - 1, PAGE_BYTES, 3 * PAGE_BYTES + 5])
def test_registered_ranges_are_whole_pages_around_the_memory(driver: Driver, size: int) -> None:
    memory: Any = [host_bytes(size, CUDA) for _ in range(4)]
    assert all(len(part) == size and part.dtype == torch.uint8 for part in memory)
    pages = [(address, count) for address, count in driver.registered.items()]
    assert [address for address, _ in pages] == [part.data_ptr() for part in memory]
    assert all(address % PAGE_BYTES == 0 and count % PAGE_BYTES == 0 and count >= size for address, count in pages)
    covered = sorted((address, address + count) for address, count in pages)
    assert all(end <= start for (_, end), (start, _) in pairwise(covered))


def test_memory_stays_registered_while_a_view_of_it_is_alive(driver: Driver) -> None:
    memory = host_bytes(64, CUDA)
    view = memory.view(torch.float32).view(4, 4)
    del memory
    gc.collect()
    assert len(driver.registered) == 1
    del view
    gc.collect()
    assert driver.registered == {}


def test_memory_that_cannot_be_pinned_is_an_error_with_a_remedy(driver: Driver) -> None:
    driver.status = 2
    with pytest.raises(QloraError, match=r"can't pin .*ulimit -l"):
        host_bytes(64, CUDA)


def test_on_a_cpu_nothing_is_registered(driver: Driver) -> None:
    assert len(host_bytes(7, torch.device("cpu"))) == 7 and driver.registered == {}
