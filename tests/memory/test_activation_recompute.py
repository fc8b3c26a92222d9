"""Kept, recomputed and offloaded layers in one model: the same gradients bit for bit, and reuse of host memory."""

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from support.layered_models import CPU, LAYERS, LateCopyStream, gradients, layered, plain_gradients
from support.tiny_models import FAMILIES

from qlora.memory.activation_offload import ActivationOffloader
from qlora.memory.activation_recompute import _shared, recompute
from qlora.memory.copy_stream import CopyStream

MIXES = [(0, 2), (2, 4), (4, 2), (LAYERS, LAYERS - 1), (0, LAYERS - 1), (3, 3)]  # layers recomputed, offloaded


def offloader_of(layers: int, copy_stream: CopyStream | None = None) -> ActivationOffloader:
    return ActivationOffloader(layers, copy_stream or LateCopyStream(), smallest_bytes=0)


@pytest.fixture(scope="module")
def llama() -> Any:
    return layered("llama")


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_some_layers_or_all_changes_no_bit(family: str) -> None:
    model, expected = layered(family), plain_gradients(family)
    assert expected.abs().sum() > 0
    for recomputed in (1, 3, LAYERS):
        assert recompute(model, recomputed) == recomputed
        assert torch.equal(gradients(model), expected), recomputed


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "phi3"])
def test_offloading_changes_no_bit_even_if_copies_are_late(family: str) -> None:
    model, expected = layered(family), plain_gradients(family)
    for recomputed, offloaded in MIXES:
        recompute(model, recomputed, offloader_of(offloaded))
        for _ in range(2):  # the second time in reused buffers
            assert torch.equal(gradients(model), expected), (recomputed, offloaded)


def test_without_waiting_for_copies_the_gradients_differ(llama: Any) -> None:
    class NeverWaits(LateCopyStream):
        def make_compute_wait(self, event: int) -> None:
            pass

    recompute(llama, 0, offloader_of(LAYERS - 1, NeverWaits()))
    assert not torch.equal(gradients(llama), gradients(layered("llama")))


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("recomputed, offloaded", MIXES)
def test_host_memory_is_reused(llama: Any, recomputed: int, offloaded: int) -> None:
    offloader = offloader_of(offloaded, CopyStream(CPU))
    recompute(llama, recomputed, offloader)
    gradients(llama)
    allocated = offloader.host_bytes
    for _ in range(3):
        gradients(llama)
    assert offloader.host_bytes == allocated > 0


def test_a_forward_without_backward_frees_its_host_memory(llama: Any) -> None:
    offloader = offloader_of(LAYERS - 1)
    recompute(llama, 0, offloader)
    expected = gradients(llama)
    allocated = offloader.host_bytes
    with torch.no_grad():
        llama.model(input_ids=torch.arange(5, 15)[None], use_cache=False)
    output: Any = llama.model(input_ids=torch.arange(5, 29)[None].repeat(2, 1), use_cache=False)
    del output  # as after an error
    assert torch.equal(gradients(llama), expected) and offloader.host_bytes == allocated


def test_the_layer_of_a_call_is_known_whatever_the_call_holds() -> None:
    """transformers up to 5.22 passes a bound method without arguments, later ones the layer as first argument."""
    model = layered("llama")
    offloader = offloader_of(LAYERS - 1)
    recompute(model, 0, offloader)
    layer, x = model.model.layers[0].eval(), torch.randn(1, 5, model.config.hidden_size, requires_grad=True)
    positions = model.model.rotary_emb(x, torch.arange(5)[None])
    keywords = {"position_embeddings": positions, "attention_mask": None}
    bound = partial(layer.forward, **keywords)
    unbound = partial(type(layer).forward, layer, **keywords)
    outputs = [layer._gradient_checkpointing_func(call, x) for call in (bound, unbound)]
    assert torch.equal(*outputs) and offloader.host_bytes > 0
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    assert weights <= {tensor.untyped_storage().data_ptr() for tensor in _shared(layer, bound)}


def test_policies_do_not_keep_a_model_alive() -> None:
    model = layered("llama")
    recompute(model, None, offloader_of(1))
    alive = weakref.ref(model)
    gc.disable()  # reference counts alone must free it: a cycle would hold gigabytes until the next collection
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()
