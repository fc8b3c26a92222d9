"""Log-probabilities without whole logits: chunk by chunk the same as from logits, and so are their gradients."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from qlora.model.lm_head import Head
from qlora.training.side_log_probs import token_log_probs

Zoo = Callable[..., Path]
TOKENS = 9


class SmallChunks(Head):
    """A head whose chunks have four rows."""

    def chunk_rows(self) -> int:
        """Rows of a chunk."""
        return 4


class Autograd(SmallChunks):
    """A head that takes autograd, as one that trains does."""

    needs_autograd = True


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])  # plain, soft cap, scale
@pytest.mark.parametrize("kind", [SmallChunks, Autograd])
def test_chunks_give_the_log_probabilities_of_whole_logits(zoo: Zoo, family: str, kind: type[Head]) -> None:
    model = AutoModelForCausalLM.from_pretrained(zoo(family), dtype=torch.float32).requires_grad_(False)
    head, draw = kind(model), torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, model.config.hidden_size, generator=draw)
    targets = torch.randint(model.config.vocab_size, (TOKENS,), generator=draw)
    weights = torch.randn(TOKENS, generator=draw)  # what an objective makes of each token

    def gradient(log_probs: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = hidden.clone().requires_grad_()
        values = log_probs(leaf)
        (values * weights).sum().backward()
        assert leaf.grad is not None
        return values.detach(), leaf.grad

    actual = gradient(lambda leaf: token_log_probs(leaf, targets, head))
    expected = gradient(lambda leaf: -F.cross_entropy(head(leaf), targets, reduction="none"))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_no_token_has_no_log_probability_and_a_zero_gradient(zoo: Zoo) -> None:
    model = AutoModelForCausalLM.from_pretrained(zoo("llama"), dtype=torch.float32).requires_grad_(False)
    for kind in (SmallChunks, Autograd):
        hidden = torch.randn(3, model.config.hidden_size, requires_grad=True)
        values = token_log_probs(hidden[:0], torch.zeros(0, dtype=torch.int64), kind(model))
        values.sum().backward()
        assert values.shape == (0,) and hidden.grad is not None and not hidden.grad.any()
