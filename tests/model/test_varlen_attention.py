"""The variable-length kernel: which versions of torch have all its options, and the reference of its start-up probe."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trees import dense_mask, layouts
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from qlora.model.attention import documents_of
from qlora.model.varlen_attention import MAX_HEAD, has_options, reference, takes, works
from qlora.utils.kernel_notes import take_kernel_notes


def of_torch_2_10(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, is_causal: bool = False
) -> None:
    """The signature in the wheel of torch 2.10.0."""


def of_torch_2_11(q: Any, k: Any, v: Any, cu: Any, longest: Any, *, scale: Any = None, window_size: Any = None) -> None:
    """The signature in the wheel of torch 2.11.0."""


def test_the_kernel_is_used_only_where_it_takes_scale_window_and_groups() -> None:
    assert has_options(varlen_attn)
    assert not has_options(of_torch_2_10) and not has_options(of_torch_2_11)


def test_without_a_gpu_it_does_not_work_and_is_not_taken() -> None:
    works.cache_clear()
    take_kernel_notes()
    assert not works(torch.device("cpu"), torch.bfloat16, 64)
    assert "SDPA runs, document by document" in take_kernel_notes()[0]  # a slower kernel is reported
    assert not takes(torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16), 0.0)
    assert MAX_HEAD == 256  # FlashAttention 2's limit


@pytest.mark.parametrize("window", [None, 1, 4])
def test_the_probes_reference_is_attention_inside_documents(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(9, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])
    documents = torch.tensor([0] * 4 + [1] * 5)
    distance = positions[:, None] - positions[None]
    seen = (documents[:, None] == documents[None]) & (distance >= 0) & (distance < (window or 9))

    def heads_first(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1)[None]

    tensors = (heads_first(query), heads_first(key), heads_first(value))
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)
    assert torch.allclose(reference((query, key, value), [0, 4, 9], [0, 4, 9], window), expected)


@settings(deadline=None, max_examples=30)
@given(data=st.data(), length=st.integers(1, 40))
def test_gathered_keys_give_attention_inside_prefix_trees(data: Any, length: int) -> None:
    """What the kernel gets for a tree, computed by the probe's reference: queries by segment, keys by path."""
    starts, branches = zip(*data.draw(st.lists(layouts(length), min_size=1, max_size=2)), strict=True)
    window = data.draw(st.none() | st.integers(1, length))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(len(starts), length, n, 8, generator=generator, dtype=torch.float64) for n in (4, 2, 2)]
    documents = documents_of(starts, length, torch.device("cpu"), branches)
    flat = [tensor.flatten(0, 1) for tensor in tensors]
    key_bounds = bounds = documents.cu_seqlens
    if documents.contexts:
        flat[1:] = [tensor[documents.contexts.indices] for tensor in flat[1:]]
        key_bounds = documents.contexts.bounds.cu_seqlens
        assert documents.contexts.bounds.longest == int(key_bounds.diff().max())
    out = reference(flat, bounds.tolist(), key_bounds.tolist(), window)
    heads_first = [tensor.transpose(1, 2) for tensor in tensors]
    mask = dense_mask(starts, branches, length, window)
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    assert torch.allclose(out, expected.flatten(0, 1))
