"""Streamed weights equal resident ones bit for bit, at two copies per layer and step; host buffers never change."""

import hashlib
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from support.layered_models import CPU, LAYERS, LateCopyStream, adapt, gradients, layered, plain_gradients
from support.tiny_models import FAMILIES
from torch import Tensor

from qlora.adapters.inject import adapted
from qlora.memory.activation_offload import ActivationOffloader
from qlora.memory.activation_recompute import recompute
from qlora.memory.copy_stream import CopyStream
from qlora.memory.weight_streaming import SLOTS, WeightStreamer, embed_on_host, streamed_layers
from qlora.model.linear_layers import frozen_linears
from qlora.quant import Quant, build_quantizer

IDS = torch.arange(5, 29)[None].repeat(2, 1)


class CountingCopyStream(LateCopyStream):
    """Counts copies to the device."""

    copies = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        super().copy(target, source)
        self.copies += 1


def streaming(family: str, resident: int, quantizer: Any = None) -> tuple[Any, WeightStreamer, CountingCopyStream]:
    """A streamed model in the order of a run: first the frozen layers, then the adapters."""
    model, copies = layered(family, quantizer=quantizer, adapted=False), CountingCopyStream()
    streamer = WeightStreamer(model, resident, copies)
    embed_on_host(model, CPU)
    adapt(model)
    return model, streamer, copies


MIXES = [(0, LAYERS, 0), (0, 0, 0), (1, 3, 0), (3, LAYERS, LAYERS - 1), (4, LAYERS, 0), (5, 2, 0), (2, 1, 3)]
QUICK = {"llama": MIXES, "llama-tied-bias": MIXES[1:3], "gpt_neox": MIXES[3:5], "gemma3": MIXES[5:]}
CASES = [
    pytest.param(family, *mix, marks=[] if mix in quick else [pytest.mark.slow])
    for family, quick in QUICK.items()
    for mix in MIXES
]


@pytest.mark.sample(of=6, every=("family",))
@pytest.mark.parametrize("family, resident, recomputed, offloaded", CASES)
def test_streamed_is_resident_bit_for_bit(family: str, resident: int, recomputed: int, offloaded: int) -> None:
    expected = plain_gradients(family)
    model, _, copies = streaming(family, resident)
    recompute(model, recomputed, ActivationOffloader(offloaded, copies, smallest_bytes=0) if offloaded else None)
    for _ in range(2):
        assert torch.equal(gradients(model), expected)


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_streams(family: str) -> None:
    expected = plain_gradients(family)
    model, streamer, _ = streaming(family, 0)
    recompute(model, None)
    assert len(streamer.layers) == LAYERS and torch.equal(gradients(model), expected)


@pytest.mark.parametrize(
    "section", [Quant(kind="dense"), Quant(kind="fp4", double=False), Quant(block=256)], ids=["dense", "fp4", "nf4-256"]
)
def test_every_quantizer_streams(section: Quant) -> None:
    quantizer = build_quantizer(section)
    expected = gradients(layered("llama", quantizer=quantizer))
    assert torch.equal(gradients(streaming("llama", 1, quantizer)[0]), expected)


@torch.no_grad()
def test_evaluation_and_generation_equal_those_of_resident_weights() -> None:
    resident, streamed = layered("llama").eval(), streaming("llama", 1)[0].eval()
    for _ in range(2):
        assert torch.equal(streamed(input_ids=IDS).logits, resident(input_ids=IDS).logits)
    generated = [
        model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False)
        for model in (resident, streamed)
    ]
    assert torch.equal(*generated)


def test_any_matrix_can_be_read_at_any_time() -> None:
    resident, streamed = layered("llama"), streaming("llama", 0)[0]
    gradients(streamed)
    for path in (*[*adapted(resident)][::-2], *adapted(resident)):
        weight, expected = (model.get_submodule(path).merged_weight() for model in (streamed, resident))
        assert torch.equal(weight, expected), path


def test_the_base_is_never_written() -> None:
    model, streamer, _ = streaming("llama", 1)

    def digest() -> str:
        return hashlib.sha256(b"".join(buffer.numpy().tobytes() for buffer in streamer._host)).hexdigest()

    before = digest()
    recompute(model, 2)
    for _ in range(2):
        gradients(model)
    assert digest() == before


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("resident", range(LAYERS + 1))
def test_a_step_copies_each_streamed_layer_twice_at_most(resident: int) -> None:
    model, streamer, counter = streaming("llama", resident)
    recompute(model, None)
    gradients(model)
    counter.copies = 0
    gradients(model)
    # In both directions, less the layers that are still in their slots when the direction changes.
    assert counter.copies == 2 * max(0, len(streamer.layers) - SLOTS)


def test_the_device_holds_two_layers_and_the_host_the_rest() -> None:
    model, streamer, _ = streaming("llama", 1)
    storages = {tensor.untyped_storage().data_ptr() for layer in frozen_linears(model).values() for tensor in
            layer.stored().values()}  # fmt: skip
    matrices = len(frozen_linears(model)) // LAYERS
    tensors = len(next(iter(frozen_linears(model).values())).stored())
    assert len(storages) == SLOTS + matrices * tensors  # those of the resident layer are not moved
    assert streamer.slot_bytes * (LAYERS - 1) == streamer.host_bytes * SLOTS


@given(layers=some.integers(1, 130), resident=some.integers(0, 140))
def test_resident_layers_are_spread_evenly(layers: int, resident: int) -> None:
    streamed = streamed_layers(layers, resident)
    assert len(streamed) == max(0, layers - resident) and streamed == sorted(set(streamed))
    gaps = {after - before for before, after in pairwise(streamed)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_biases_of_streamed_layers_are_on_the_device() -> None:
    """They are no part of the host buffers: once they stayed on the host, and the first product failed on a GPU."""
    model, meta = layered("llama-tied-bias", adapted=False), torch.device("meta")  # stands for a GPU
    layers = frozen_linears(model.model.layers[0])
    assert any(layer.bias is not None for layer in layers.values())
    WeightStreamer(model, LAYERS - 1, CopyStream(meta))
    streamed = [layer for layer in frozen_linears(model).values() if layer.fetch is not None]
    assert len(streamed) == len(layers)
    for layer in streamed:
        assert layer.device == meta and (layer.bias is None or layer.bias.device == meta)
