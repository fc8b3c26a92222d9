"""The same rows, however dealt to micro-batches and processes, packed or not: one gradient and one loss."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from support.step_gradients import ROWS, difference, rows_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora.data.batching.collate import collate
from qlora.data.batching.packing import pack
from qlora.data.batching.sampler import micro_batches, shares
from qlora.data.types import Example
from qlora.model.attention import NAME
from qlora.training.loss import TokenLoss

Zoo = Callable[..., Path]
# float32: sums of the same products in another order. Measured: 7e-7 at most, in 200 splits.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def loss(zoo: Zoo) -> TokenLoss:
    """A tiny Llama whose attention is trained; embedding and head are frozen, as in a run."""
    model = AutoModelForCausalLM.from_pretrained(zoo("llama"), dtype=torch.float32)
    model.set_attn_implementation(NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("proj" in name)
    return TokenLoss(model).train()


def step(loss: TokenLoss, examples: Sequence[Example], micro_batch: int, world: int) -> tuple[Tensor, float]:
    """Gradient and mean loss of one optimizer step over `world` ranks, each with its share, summed as they are."""
    order = list(range(len(examples)))
    # Processes of unequal cards: every second one takes a row more at a time.
    sizes = [micro_batch + rank % 2 for rank in range(world)]
    dealt = shares(order, [len(example) for example in examples], sizes)
    groups = [micro_batches(share, len(order), own, sizes) for share, own in zip(dealt, sizes, strict=True)]
    assert len({len(mine) for mine in groups}) == 1
    batches = [[collate([examples[i] for i in group or order[:1]], 0) for group in mine] for mine in groups]
    batches = [
        [batch if group else batch.silent() for batch, group in zip(mine, share, strict=True)]
        for mine, share in zip(batches, groups, strict=True)
    ]
    trained = sum(batch.trained_tokens for mine in batches for batch in mine)
    summed, total = torch.zeros(()), 0.0
    for mine in batches:
        loss.zero_grad(set_to_none=True)
        for batch in mine:
            part = loss(batch.input_ids, batch.labels, batch.position_ids, batch.starts) / trained
            part.backward()
            total += float(part.detach())
        grads = [value.grad.flatten() for value in loss.parameters() if value.grad is not None]
        summed = summed + torch.cat(grads)
    return summed, total


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 4, 16])
def test_sixteen_rows_give_one_gradient(loss: TokenLoss, micro_batch: int, packed: bool, world: int) -> None:
    examples = rows_of(0)
    expected, mean = step(loss, examples, 16, 1)
    found, again = step(loss, pack(examples, 96) if packed else examples, micro_batch, world)
    assert difference(found, expected) <= TOLERANCE
    assert abs(again - mean) <= TOLERANCE * mean


def test_two_hundred_random_splits_give_one_gradient(loss: TokenLoss) -> None:
    """Any micro-batch, 1 to 5 processes, any packing length, rows in any order."""
    draw, worst = random.Random(0), 0.0
    for trial in range(200):
        if trial % 20 == 0:
            examples = rows_of(trial)
            expected, mean = step(loss, examples, ROWS, 1)
        rows = draw.sample(examples, ROWS)
        rows = pack(rows, draw.randint(40, 200)) if draw.random() < 0.5 else rows
        found, again = step(loss, rows, draw.randint(1, ROWS), draw.randint(1, 5))
        worst = max(worst, difference(found, expected), abs(again - mean) / mean)
    assert worst <= TOLERANCE


def test_a_mean_of_means_would_be_far_off(loss: TokenLoss) -> None:
    """What the law guards against is large on these rows, so the law has teeth."""
    examples = rows_of(0)
    expected, _ = step(loss, examples, 16, 1)
    parts = [step(loss, [example], 1, 1)[0] for example in examples if example.trained_tokens()]
    assert difference(sum(parts[1:], parts[0]) / len(parts), expected) > 0.05
