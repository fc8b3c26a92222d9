"""Answers that share a prefix have the loss and gradients of sequences of their own; the probe sees leaks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.trees import tree_of
from torch import Tensor, nn
from training.test_document_isolation import HAVE_SDPA, loss_of

from qlora.data.batching.collate import collate
from qlora.data.batching.join import join_documents
from qlora.data.prefix_tree import paths_of
from qlora.data.types import Example
from qlora.errors import DataError
from qlora.model.attention import DOCUMENT_ATTENTION
from qlora.model.lm_head import shares_prefixes
from qlora.training.loss import TokenLoss
from qlora.training.packing_probe import refuse_tree_leaks

Zoo = Callable[..., Path]
CPU = torch.device("cpu")
TREES = [tree_of(seed, turns, f"rows.jsonl:{seed}", size=20) for seed, turns in ((1, 3), (2, 1), (3, 4), (4, 2))]


def gradients(loss: TokenLoss, rows: list[Example]) -> tuple[Tensor, list[Tensor]]:
    """The loss of a batch, and the gradients of the first and the last layer's weights."""
    weights = [layer.weight for layer in loss.model.modules() if isinstance(layer, nn.Linear)]
    weights = [weights[0].requires_grad_(), weights[-2].requires_grad_()]  # the last one is the head
    value = loss(*collate(rows, 0).arguments)
    return value.detach(), list(torch.autograd.grad(value, weights))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("family", HAVE_SDPA)
def test_a_tree_is_the_sum_of_its_branches(zoo: Zoo, family: str) -> None:
    """Packed beside others and padded; a window of 32 tokens in two families."""
    loss = loss_of(zoo, family, DOCUMENT_ATTENTION)
    assert shares_prefixes(loss.model)
    rows = [path for tree in TREES for path in paths_of(tree)]
    packed = [join_documents([TREES[0], rows[0], TREES[2]]), join_documents([TREES[1], TREES[3]])]
    (value, grads), (expected, expected_grads) = gradients(loss, packed), gradients(loss, [*rows, rows[0]])
    assert_close(value, expected, 1e-6)
    for actual, exact in zip(grads, expected_grads, strict=True):
        assert_close(actual, exact, 1e-5)


def test_the_split_into_micro_batches_does_not_matter(zoo: Zoo) -> None:
    loss = loss_of(zoo, "llama", DOCUMENT_ATTENTION)
    value, grads = gradients(loss, TREES)
    for groups in ([TREES[:1], TREES[1:]], [[tree] for tree in TREES], [[join_documents(TREES)]]):
        parts = [gradients(loss, group) for group in groups]
        assert_close(torch.stack([part for part, _ in parts]).sum(), value, 1e-6)
        for index, expected in enumerate(grads):
            assert_close(torch.stack([part[index] for _, part in parts]).sum(0), expected, 1e-6)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_in_bfloat16_a_tree_differs_by_rounding(zoo: Zoo, family: str) -> None:
    """The 16-bit kernel of CPUs: as far from float32 as the branches alone are, times two."""
    exact = loss_of(zoo, family, DOCUMENT_ATTENTION)
    rows = [path for tree in TREES for path in paths_of(tree)]
    expected, expected_grads = gradients(exact, rows)
    loss = loss_of(zoo, family, DOCUMENT_ATTENTION).to(torch.bfloat16)
    (value, grads), (alone, alone_grads) = gradients(loss, TREES), gradients(loss, rows)
    assert abs(value - expected) <= 2 * abs(alone - expected) + 1e-3 * expected
    for tree, row, true in zip(grads, alone_grads, expected_grads, strict=True):
        assert (tree.float() - true).norm() <= 2 * (row.float() - true).norm()


class LooksBack(nn.Module):
    """A mixer that reads the token before in the sequence, as convolutions and recurrent layers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, I] -> [B, T, I]."""
        return self.inner(hidden) + 0.1 * hidden.roll(1, dims=1)  # type: ignore[no-any-return]


def test_the_probe_accepts_trees_and_sees_a_layer_that_mixes_branches(zoo: Zoo) -> None:
    loss = loss_of(zoo, "llama", DOCUMENT_ATTENTION)
    error = refuse_tree_leaks(loss, [paths_of(TREES[0])[0], TREES[0]], torch.float32, CPU)
    assert error is not None and error <= 1e-5
    assert refuse_tree_leaks(loss, paths_of(TREES[0]), torch.float32, CPU) is None  # no tree among them
    layer: Any = loss.model.model.layers[0]
    layer.mlp = LooksBack(layer.mlp)
    with pytest.raises(DataError, match="answers that share a prefix see each other"):
        refuse_tree_leaks(loss, TREES, torch.float32, CPU)


def test_other_kernels_get_no_trees(zoo: Zoo) -> None:
    loss = loss_of(zoo, "llama", "sdpa")
    assert not shares_prefixes(loss.model)
    with pytest.raises(ValueError, match="sdpa does not take prefix trees"):
        loss(*collate(TREES, 0).arguments)
