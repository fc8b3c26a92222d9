"""Streamed equals resident bit for bit, at two copies a layer and step; the host's bytes never change."""

import hashlib
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from support.layered_models import CPU, LAYERS, LateCopyStream, adapt, gradients, layered
from support.tiny_models import FAMILIES
from torch import Tensor

from qlora.adapters.inject import adapted, frozen_linears
from qlora.memory.activation_offload import ActivationOffloader
from qlora.memory.activation_recompute import recompute
from qlora.memory.weight_streaming import SLOTS, WeightStreamer, embed_on_host, streamed_layers
from qlora.quant import QUANTIZERS
from qlora.quant.nf4 import Nf4

IDS = torch.arange(5, 29)[None].repeat(2, 1)


class CountingLane(LateCopyStream):
    """Counts copies to the device."""

    copies = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        super().copy(target, source)
        self.copies += 1


def streaming(family: str, resident: int, quantizer: Any = None) -> tuple[Any, WeightStreamer, CountingLane]:
    """A model as it is set up to stream: frozen first, adapted then."""
    model, lane = layered(family, quantizer=quantizer, adapted=False), CountingLane()
    stream = WeightStreamer(model, resident, lane)
    embed_on_host(model, CPU)
    adapt(model)
    return model, stream, lane


@pytest.mark.parametrize("resident, recomputed, parked", [
    (0, LAYERS, 0), (0, 0, 0), (1, 3, 0), (3, LAYERS, LAYERS - 1), (4, LAYERS, 0), (5, 2, 0), (2, 1, 3),
])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "gpt_neox", "gemma3"])
def test_streamed_is_resident_bit_for_bit(family: str, resident: int, recomputed: int, parked: int) -> None:
    expected = gradients(layered(family))
    model, _, lane = streaming(family, resident)
    recompute(model, recomputed, ActivationOffloader(parked, lane, smallest_bytes=0) if parked else None)
    for _ in range(2):
        assert torch.equal(gradients(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_streams(family: str) -> None:
    expected = gradients(layered(family))
    model, stream, _ = streaming(family, 0)
    recompute(model, None)
    assert len(stream.layers) == LAYERS and torch.equal(gradients(model), expected)


@pytest.mark.parametrize("quantizer", [QUANTIZERS["dense"](), QUANTIZERS["fp4"](double=False), Nf4(block=256)], ids=str)
def test_every_way_to_store_streams(quantizer: Any) -> None:
    expected = gradients(layered("llama", quantizer=quantizer))
    assert torch.equal(gradients(streaming("llama", 1, quantizer)[0]), expected)


@torch.no_grad()
def test_evaluation_and_generation_are_those_of_resident_weights() -> None:
    resident, streamed = layered("llama").eval(), streaming("llama", 1)[0].eval()
    for _ in range(2):
        assert torch.equal(streamed(input_ids=IDS).logits, resident(input_ids=IDS).logits)
    answers = [
        model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False)
        for model in (resident, streamed)
    ]
    assert torch.equal(*answers)


def test_any_matrix_is_there_whenever_it_is_asked_for() -> None:
    resident, streamed = layered("llama"), streaming("llama", 0)[0]
    gradients(streamed)
    for path in (*[*adapted(resident)][::-2], *adapted(resident)):
        ours, theirs = (model.get_submodule(path).merged_weight() for model in (streamed, resident))
        assert torch.equal(ours, theirs), path


def test_the_base_is_never_written() -> None:
    model, stream, _ = streaming("llama", 1)

    def digest() -> str:
        return hashlib.sha256(b"".join(buffer.numpy().tobytes() for buffer in stream._host)).hexdigest()

    before = digest()
    recompute(model, 2)
    for _ in range(2):
        gradients(model)
    assert digest() == before


@pytest.mark.parametrize("resident", range(LAYERS + 1))
def test_a_step_copies_each_streamed_layer_twice_at_most(resident: int) -> None:
    model, stream, lane = streaming("llama", resident)
    recompute(model, None)
    gradients(model)
    lane.copies = 0
    gradients(model)
    # Both ways, less the layers that are in their slots at the turns.
    assert lane.copies == 2 * max(0, len(stream.layers) - SLOTS)


def test_the_device_holds_two_layers_and_the_host_the_rest() -> None:
    model, stream, _ = streaming("llama", 1)
    held = {tensor.untyped_storage().data_ptr() for layer in frozen_linears(model).values() for tensor in
            layer.stored().values()}  # fmt: skip
    matrices = len(frozen_linears(model)) // LAYERS
    parts = len(next(iter(frozen_linears(model).values())).stored())
    assert len(held) == SLOTS + matrices * parts  # the resident layer's lie where they were
    assert stream.slot_bytes * (LAYERS - 1) == stream.host_bytes * SLOTS


@given(layers=some.integers(1, 130), resident=some.integers(0, 140))
def test_resident_layers_are_spread_evenly(layers: int, resident: int) -> None:
    streamed = streamed_layers(layers, resident)
    assert len(streamed) == max(0, layers - resident) and streamed == sorted(set(streamed))
    gaps = {after - before for before, after in pairwise(streamed)}
    assert not gaps or max(gaps) - min(gaps) <= 1
