"""Block attention on a CPU equals masked attention: documents, trees, windows, grouped heads, both passes, compiled."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trees import Branches, Starts, dense_mask, layouts
from torch import Tensor
from torch.nn import functional as F

from qlora.data.types import Branch
from qlora.model.attention import document_attention, documents_of
from qlora.model.cpu_attention import block_attention, blocks_of


def inputs_of(rows: int, heads: int, groups: int, length: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Query, key, value as transformers lays them out, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, length, count, 16) for count in (heads, groups, groups, heads)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [*(tensor.transpose(1, 2).requires_grad_() for tensor in tensors[:3]), tensors[3]]


def reference(inputs: list[Tensor], starts: Starts, window: int | None, branches: Branches = ()) -> list[Tensor]:
    """Output and gradients in float64 through a dense mask."""
    query, key, value = (tensor.detach().double().requires_grad_() for tensor in inputs[:3])
    length, repeat = query.shape[2], query.shape[1] // key.shape[1]
    mask = dense_mask(starts, branches or ((),) * len(starts), length, window)
    repeated = (tensor.repeat_interleave(repeat, 1) for tensor in (key, value))
    out = F.scaled_dot_product_attention(query, *repeated, attn_mask=mask).transpose(1, 2)
    return [out, *torch.autograd.grad(out, (query, key, value), inputs[3].double())]


def block(inputs: list[Tensor], starts: Starts, window: int | None, branches: Branches = ()) -> list[Tensor]:
    """Output and gradients of block attention."""
    length = inputs[0].shape[2]
    segments = documents_of(starts, length, torch.device("cpu"), branches).flat_segments
    out = block_attention(*inputs[:3], segments, window, inputs[0].shape[-1] ** -0.5)
    return [out, *torch.autograd.grad(out, inputs[:3], inputs[3])]


@settings(deadline=None, max_examples=8)
@given(data=st.data(), groups=st.sampled_from([1, 2]), repeat=st.sampled_from([1, 3]), length=st.integers(1, 200))
def test_block_attention_is_masked_attention(data: Any, groups: int, repeat: int, length: int) -> None:
    starts, branches = zip(*data.draw(st.lists(layouts(length), min_size=1, max_size=3)), strict=True)
    window = data.draw(st.none() | st.integers(1, length + 5))
    inputs = inputs_of(len(starts), groups * repeat, groups, length, torch.float32)
    settings = (starts, window, branches)
    for actual, exact in zip(block(inputs, *settings), reference(inputs, *settings), strict=True):
        assert (actual - exact).norm() <= 2e-6 * exact.norm() + 1e-6  # float32 against float64


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("scores_bytes", [1, 4 * 128 * 200 * 3, 4 * 128 * 200 * 3 * 2, 2**30])
def test_the_number_of_scores_at_a_time_does_not_matter(scores_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora.model.cpu_attention.SCORES_BYTES", scores_bytes)
    starts: Starts = ((0, 50), (0, 50), (0, 120))
    inputs = inputs_of(3, 6, 2, 200, torch.float32)
    for actual, exact in zip(block(inputs, starts, None), reference(inputs, starts, None), strict=True):
        assert (actual - exact).norm() <= 2e-6 * exact.norm() + 1e-6  # float32 against float64


def test_bfloat16_gradients_are_as_accurate_as_those_of_sdpa() -> None:
    inputs = inputs_of(2, 4, 4, 200, torch.bfloat16)
    exact = reference(inputs, ((0,), (0,)), None)
    out = F.scaled_dot_product_attention(*inputs[:3], is_causal=True).transpose(1, 2)
    sdpa = [out, *torch.autograd.grad(out, inputs[:3], inputs[3])]
    for actual, other, true in zip(block(inputs, ((0,), (0,)), None), sdpa, exact, strict=True):
        assert (actual - true).norm() <= 1.3 * (other - true).norm()  # probabilities are rounded once more than there


def test_only_16_bit_training_on_a_cpu_uses_block_attention() -> None:
    """By the name of the autograd node; evaluation and float32 use transformers' kernels."""
    query, key, value, _ = inputs_of(1, 2, 2, 9, torch.bfloat16)
    module = torch.nn.Module()
    trained, _ = document_attention(module, query, key, value, None)
    assert "block_attention" in type(trained.grad_fn).__name__.lower()
    detached = [tensor.detach() for tensor in (query, key, value)]
    evaluated, _ = document_attention(module, *detached, None)
    expected = F.scaled_dot_product_attention(*detached, is_causal=True)
    assert torch.equal(evaluated, expected.transpose(1, 2))
    in_float32 = (tensor.float().requires_grad_() for tensor in detached)
    float32, _ = document_attention(module, *in_float32, None)
    assert "block_attention" not in type(float32.grad_fn.next_functions[0][0]).__name__.lower()  # type: ignore[union-attr]


@pytest.mark.parametrize("starts", [(0,), (0, 130), (0, 5, 9, 250)])
def test_blocks_cover_each_query_once_and_start_at_its_document(starts: tuple[int, ...]) -> None:
    blocks = blocks_of(tuple(Branch(start, -1) for start in starts), 300, None)
    assert [blocks[0].start, *(block.end for block in blocks)] == [0, 128, 256, 300]
    for block in blocks:
        assert block.first_key == max(start for start in starts if start <= block.start)


def test_the_operator_is_well_formed_for_the_compiler() -> None:
    inputs = inputs_of(1, 2, 1, 12, torch.float32)
    segments = documents_of(((0, 5),), 12, torch.device("cpu"), ((Branch(8, 6),),)).flat_segments
    torch.library.opcheck(block_attention, (*inputs[:3], segments, None, 0.25))


@settings(deadline=None, max_examples=30)
@given(data=st.data(), groups=st.sampled_from([1, 2]), length=st.integers(1, 80))
def test_sdpa_run_by_segment_is_masked_attention(data: Any, groups: int, length: int) -> None:
    starts, branches = zip(*data.draw(st.lists(layouts(length), min_size=1, max_size=2)), strict=True)
    window = data.draw(st.none() | st.integers(1, length + 5))
    inputs = inputs_of(len(starts), 2, groups, length, torch.float32)
    documents = documents_of(starts, length, torch.device("cpu"), branches)
    options = {"documents": documents, "sliding_window": window, "num_key_value_groups": 2 // groups}
    out, _ = document_attention(torch.nn.Module().train(), *inputs[:3], None, **options)
    result = [out, *torch.autograd.grad(out, inputs[:3], inputs[3])]
    for actual, exact in zip(result, reference(inputs, starts, window, branches), strict=True):
        assert (actual - exact).norm() <= 2e-6 * exact.norm() + 1e-5  # float32 against float64
