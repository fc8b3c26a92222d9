"""Attention with sinks equals a softmax over scores and sink, in documents, branches and windows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data.types import Branch
from qlora.model.attention import document_attention, documents_of
from qlora.model.segment_masks import Visibility
from qlora.model.sink_attention import Visible, masked_sink_attention, sink_attention

SEGMENTS = ((Branch(0, -1), Branch(100, -1)), (Branch(0, -1), Branch(90, 50)))  # documents; a document with a branch


def inputs(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(length)
    shapes = [(2, 4, length, 16), (2, 2, length, 16), (2, 2, length, 16), (4,)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@settings(max_examples=8, deadline=None)
@given(length=st.integers(101, 280), window=st.sampled_from([None, 1, 7, 64]))
def test_outputs_and_all_gradients_equal_those_of_dense_softmax(length: int, window: int | None) -> None:
    mask = torch.stack([Visibility(segments, length, window).mask(0, length) for segments in SEGMENTS])[:, None]
    exact, single = inputs(length, torch.float64), inputs(length, torch.float32)
    query, key, value, sinks = exact
    expected = masked_sink_attention((query, key, value), sinks, mask, 0.3)
    output = sink_attention(*single, Visible(SEGMENTS, window, 0.3))
    assert torch.allclose(output.double(), expected, atol=2e-6)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((output * weights).sum(), single)
    for gradient, reference in zip(gradients, torch.autograd.grad((expected * weights).sum(), exact), strict=True):
        assert torch.allclose(gradient.double(), reference, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_within_their_rounding(dtype: torch.dtype) -> None:
    values = inputs(150, dtype)
    visible = Visible(SEGMENTS, 40, 0.3)
    exact = sink_attention(*(value.float() for value in values), visible)
    assert float((sink_attention(*values, visible).float() - exact).abs().max()) < 4 * torch.finfo(dtype).eps


def test_dropout_of_the_class_is_applied() -> None:
    query, key, value, sinks = inputs(150, torch.float32)
    documents = documents_of(((0, 100), (0,)), 150, query.device)
    module, options = torch.nn.Module(), {"s_aux": sinks, "scaling": 0.3, "documents": documents}
    plain = document_attention(module, query, key, value, None, **options)[0]
    torch.manual_seed(0)
    dropped = [document_attention(module, query, key, value, None, dropout=0.2, **options)[0] for _ in range(60)]
    assert not torch.equal(dropped[0], dropped[1])
    assert float((torch.stack(dropped).mean(0) - plain).abs().mean()) < 0.2 * float(plain.abs().mean())
