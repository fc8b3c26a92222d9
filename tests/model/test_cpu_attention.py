"""The CPU's block attention is attention: documents, windows and groups, forward and backward, and in the compiler."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from qlora.model.attention import document_attention, documents_of
from qlora.model.cpu_attention import block_attention, blocks_of

Cuts = tuple[tuple[int, ...], ...]


def inputs_of(rows: int, heads: int, groups: int, length: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Query, key, value as transformers lays them out, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, length, each, 16) for each in (heads, groups, groups, heads)]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [*(each.transpose(1, 2).requires_grad_() for each in made[:3]), made[3]]


def exact(inputs: list[Tensor], cuts: Cuts, window: int | None) -> list[Tensor]:
    """Output and gradients in float64 through a dense mask."""
    query, key, value = (each.detach().double().requires_grad_() for each in inputs[:3])
    length, repeat = query.shape[2], query.shape[1] // key.shape[1]
    seen = torch.zeros(len(cuts), 1, length, length, dtype=torch.bool)
    for row, starts in enumerate(cuts):
        for begin, end in zip(starts, (*starts[1:], length), strict=True):
            seen[row, 0, begin:end, begin:end] = True
    seen = seen.tril()
    if window is not None:
        seen &= torch.ones(length, length, dtype=torch.bool).triu(1 - window)
    repeated = (each.repeat_interleave(repeat, 1) for each in (key, value))
    out = F.scaled_dot_product_attention(query, *repeated, attn_mask=seen).transpose(1, 2)
    return [out, *torch.autograd.grad(out, (query, key, value), inputs[3].double())]


def ours(inputs: list[Tensor], cuts: Cuts, window: int | None) -> list[Tensor]:
    length = inputs[0].shape[2]
    ends = documents_of(cuts, length, torch.device("cpu")).cumulative
    out = block_attention(*inputs[:3], ends, window, inputs[0].shape[-1] ** -0.5)
    return [out, *torch.autograd.grad(out, inputs[:3], inputs[3])]


@settings(deadline=None, max_examples=40)
@given(data=st.data(), groups=st.sampled_from([1, 2]), repeat=st.sampled_from([1, 3]), length=st.integers(1, 300))
def test_block_attention_is_masked_attention(data: Any, groups: int, repeat: int, length: int) -> None:
    cut = st.sets(st.integers(1, max(1, length - 1)), max_size=4).map(lambda found: (0, *sorted(found - {length})))
    cuts = data.draw(st.lists(cut, min_size=1, max_size=3).map(tuple))
    window = data.draw(st.none() | st.integers(1, length + 5))
    inputs = inputs_of(len(cuts), groups * repeat, groups, length, torch.float32)
    for mine, true in zip(ours(inputs, cuts, window), exact(inputs, cuts, window), strict=True):
        assert (mine - true).norm() <= 2e-6 * true.norm() + 1e-6  # float32 against float64


@pytest.mark.parametrize("scores_bytes", [1, 4 * 128 * 200 * 3, 4 * 128 * 200 * 3 * 2, 2**30])
def test_however_few_scores_are_there_at_a_time_it_is_the_same(
    scores_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora.model.cpu_attention.SCORES_BYTES", scores_bytes)
    cuts: Cuts = ((0, 50), (0, 50), (0, 120))
    inputs = inputs_of(3, 6, 2, 200, torch.float32)
    for mine, true in zip(ours(inputs, cuts, None), exact(inputs, cuts, None), strict=True):
        assert (mine - true).norm() <= 2e-6 * true.norm() + 1e-6  # float32 against float64


def test_its_bfloat16_gradients_are_as_near_to_exact_ones_as_sdpas() -> None:
    inputs = inputs_of(2, 4, 4, 200, torch.bfloat16)
    true = exact(inputs, ((0,), (0,)), None)
    out = F.scaled_dot_product_attention(*inputs[:3], is_causal=True).transpose(1, 2)
    theirs = [out, *torch.autograd.grad(out, inputs[:3], inputs[3])]
    for mine, other, each in list(zip(ours(inputs, ((0,), (0,)), None), theirs, true, strict=True)):
        assert (mine - each).norm() <= 1.3 * (other - each).norm()  # probabilities are rounded once more than there


def test_training_in_bfloat16_on_a_cpu_takes_it_and_nothing_else_does() -> None:
    """The autograd node tells: evaluation and float32 stay transformers' own."""
    query, key, value, _ = inputs_of(1, 2, 2, 9, torch.bfloat16)
    module = torch.nn.Module()
    trained, _ = document_attention(module, query, key, value, None)
    assert "block_attention" in type(trained.grad_fn).__name__.lower()
    still, _ = document_attention(module, *(each.detach() for each in (query, key, value)), None)
    plain = F.scaled_dot_product_attention(*(each.detach() for each in (query, key, value)), is_causal=True)
    assert torch.equal(still, plain.transpose(1, 2))
    in_float32 = (each.detach().float().requires_grad_() for each in (query, key, value))
    wide, _ = document_attention(module, *in_float32, None)
    assert "block_attention" not in type(wide.grad_fn.next_functions[0][0]).__name__.lower()  # type: ignore[union-attr]


@pytest.mark.parametrize("starts", [(0,), (0, 130), (0, 5, 9, 250)])
def test_blocks_cover_each_query_once_and_start_at_its_document(starts: tuple[int, ...]) -> None:
    blocks = blocks_of(starts, 300, None)
    assert [blocks[0].begin, *(block.end for block in blocks)] == [0, 128, 256, 300]
    for block in blocks:
        assert block.first == max(start for start in starts if start <= block.begin)


def test_the_operator_is_well_formed_for_the_compiler() -> None:
    inputs = inputs_of(1, 2, 1, 12, torch.float32)
    ends = documents_of(((0, 5),), 12, torch.device("cpu")).cumulative
    torch.library.opcheck(block_attention, (*inputs[:3], ends, None, 0.25))
