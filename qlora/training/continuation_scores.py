"""Log-likelihoods of continuations of contexts, by the same decoder and head as the evaluation's loss."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from qlora.data.batching.collate import collate
from qlora.data.types import IGNORED, Example
from qlora.training.loss import TokenLoss

BATCH_SIZE = 8


class Score(NamedTuple):
    """The sum of a continuation's log-probabilities, in nats, and whether each of its tokens is the likeliest one."""

    log_likelihood: float
    is_greedy: bool


@torch.no_grad()
def score_continuations(
    model: nn.Module,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    device: torch.device,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Score]:
    """The score of each continuation, given its context: ids of both, of which a context has at least one."""
    training, head = model.training, TokenLoss(model.eval()).head
    order = sorted(range(len(pairs)), key=lambda index: sum(map(len, pairs[index])))
    scores: dict[int, Score] = {}
    for start in range(0, len(order), BATCH_SIZE):
        group = order[start : start + BATCH_SIZE]
        ids = [np.asarray([*pairs[index][0], *pairs[index][1]], np.int32) for index in group]
        examples = [Example("", row, np.full(len(row), IGNORED, np.int32)) for row in ids]
        batch = collate(examples, pad_id=0).to(device)
        hidden = head.hidden_states(batch.input_ids, batch.position_ids, batch.layout)
        for row, index in enumerate(group):
            first, last = len(pairs[index][0]), len(ids[row])
            targets = batch.input_ids[row, first:last]
            states = hidden[row, first - 1 : last - 1].split(head.chunk_rows())
            parts = [_score(head(h), t) for h, t in zip(states, targets.split(head.chunk_rows()), strict=True)]
            scores[index] = Score(sum(part[0] for part in parts), all(part[1] for part in parts))
        report(min(start + BATCH_SIZE, len(order)), len(order))
    model.train(training)
    return [scores[index] for index in range(len(pairs))]


def _score(logits: torch.Tensor, targets: torch.Tensor) -> Score:
    """Of some tokens: float32 logits [N, V] and the ids [N]."""
    values = logits.log_softmax(-1).gather(1, targets[:, None]).double().sum()
    return Score(float(values), bool((logits.argmax(-1) == targets).all()))
