"""Keep, recompute or park, mixed in one model: the same gradients bit for bit, and host memory as planned."""

from typing import Any

import pytest
import torch
from support.layered_models import CPU, LAYERS, LateCopyStream, gradients, layered
from support.tiny_models import FAMILIES

from qlora.memory.activation_offload import ActivationOffloader
from qlora.memory.activation_recompute import recompute
from qlora.memory.copy_stream import CopyStream

MIXES = [(0, 2), (2, 4), (4, 2), (LAYERS, LAYERS - 1), (0, LAYERS - 1), (3, 3)]  # layers recomputed, parked


def parking(layers: int, lane: CopyStream | None = None) -> ActivationOffloader:
    return ActivationOffloader(layers, lane or LateCopyStream(), smallest_bytes=0)


@pytest.fixture(scope="module")
def llama() -> Any:
    return layered("llama")


@pytest.mark.parametrize("recomputed", [1, 3, LAYERS])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_some_layers_or_all_changes_no_bit(family: str, recomputed: int) -> None:
    model = layered(family)
    kept = gradients(model)
    assert recompute(model, recomputed) == recomputed
    assert kept.abs().sum() > 0 and torch.equal(gradients(model), kept)


@pytest.mark.parametrize("recomputed, parked", MIXES)
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "phi3"])
def test_parking_changes_no_bit_however_late_the_copies_come(family: str, recomputed: int, parked: int) -> None:
    model = layered(family)
    kept = gradients(model)
    recompute(model, recomputed, parking(parked))
    for _ in range(2):  # the second time in buffers that were used
        assert torch.equal(gradients(model), kept)


def test_the_copies_matter(llama: Any) -> None:
    class Never(LateCopyStream):
        def wait(self, mark: int) -> None:
            pass

    recompute(llama, 0, parking(LAYERS - 1, Never()))
    assert not torch.equal(gradients(llama), gradients(layered("llama")))


@pytest.mark.parametrize("recomputed, parked", MIXES)
def test_host_memory_is_used_again_and_again(llama: Any, recomputed: int, parked: int) -> None:
    place = parking(parked, CopyStream(CPU))
    recompute(llama, recomputed, place)
    gradients(llama)
    taken = place.host_bytes
    for _ in range(3):
        gradients(llama)
    assert place.host_bytes == taken > 0


def test_a_forward_without_backward_leaves_nothing_behind(llama: Any) -> None:
    place = parking(LAYERS - 1)
    recompute(llama, 0, place)
    kept = gradients(llama)
    taken = place.host_bytes
    with torch.no_grad():
        llama.model(input_ids=torch.arange(5, 15)[None], use_cache=False)
    lost: Any = llama.model(input_ids=torch.arange(5, 29)[None].repeat(2, 1), use_cache=False)
    del lost  # as after an error
    assert torch.equal(gradients(llama), kept) and place.host_bytes == taken
