"""The certificate: how far the written model is from the one that was trained, measured on rows it never saw."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.data.batching.collate import Batch, collate
from qlora.data.types import IGNORED, Example
from qlora.model.lm_head import Head

BATCH_TOKENS = 2048  # of both models at a time
LOGITS_SHARE = 4  # of as many positions as the loss takes at a time, logits of both models and their logarithms exist
DROWNED = 0.5  # a layer whose rounding error is more than half its update is named


@dataclass(frozen=True)
class Agreement:
    """Trained against written model, over every position of the rows."""

    mean_kl: float  # nats, KL(trained || written)
    top1: float  # share of positions whose most likely token is the same
    max_logit_difference: float
    rows: int
    tokens: int
    trained_loss: float  # nats per trained token of the same rows
    written_loss: float

    def __str__(self) -> str:
        return (
            f"top-1 agreement {100 * self.top1:.2f} %, mean KL {self.mean_kl:.2e}, largest logit difference "
            f"{self.max_logit_difference:.2e}, loss {self.trained_loss:.4f} -> {self.written_loss:.4f}, "
            f"on {self.rows} rows ({self.tokens:,} tokens)"
        )


@dataclass
class _Sums:
    """What is added up over positions."""

    kl: float = 0.0
    same: int = 0
    tokens: int = 0
    largest: float = 0.0
    trained_loss: float = 0.0
    written_loss: float = 0.0
    targets: int = 0

    def add(self, ours: Tensor, theirs: Tensor, targets: Tensor) -> None:
        """Float32 logits [N, V] of both models, and what their positions should predict [N]."""
        logs, others = ours.log_softmax(-1), theirs.log_softmax(-1)
        self.kl += F.kl_div(others, logs, log_target=True, reduction="sum").item()
        self.same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        self.largest = max(self.largest, (ours - theirs).abs().max().item())
        self.trained_loss += F.nll_loss(logs, targets, ignore_index=IGNORED, reduction="sum").item()
        self.written_loss += F.nll_loss(others, targets, ignore_index=IGNORED, reduction="sum").item()
        self.tokens += len(targets)
        self.targets += int((targets != IGNORED).sum())


@torch.no_grad()
def compare(
    trained: nn.Module,
    written: nn.Module,
    examples: Sequence[Example],
    device: torch.device,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Agreement:
    """Run both models on every row and compare their next-token distributions position by position."""
    heads, sums, done = (Head(trained), Head(written)), _Sums(), 0
    for batch in _batches(examples):
        ids, positions = batch.input_ids.to(device), batch.position_ids.to(device)
        real = (torch.arange(ids.shape[1]) < torch.tensor(batch.lengths)[:, None]).to(device)
        ours, theirs = (head.hidden(ids, positions, batch.starts)[real] for head in heads)
        targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED).to(device)[real]
        for chunk in torch.arange(len(targets), device=device).split(max(1, heads[0].chunk_rows() // LOGITS_SHARE)):
            sums.add(heads[0].as_served(ours[chunk]), heads[1].as_served(theirs[chunk]), targets[chunk])
        done += len(ids)
        report(done, len(examples))
    return Agreement(
        max(0.0, sums.kl / max(1, sums.tokens)),
        sums.same / max(1, sums.tokens),
        sums.largest,
        len(examples),
        sums.tokens,
        sums.trained_loss / max(1, sums.targets),
        sums.written_loss / max(1, sums.targets),
    )


def _batches(examples: Sequence[Example]) -> Iterator[Batch]:
    """Rows by length, together as long as they are BATCH_TOKENS with their pads: a model may be read for each batch."""
    waiting: list[Example] = []
    for example in sorted(examples, key=len):
        if waiting and (len(waiting) + 1) * len(example) > BATCH_TOKENS:
            yield collate(waiting, pad_id=0)
            waiting = []
        waiting.append(example)
    if waiting:
        yield collate(waiting, pad_id=0)


@dataclass(frozen=True)
class Rounding:
    """What storing the sum in the written type took from the update: |round(W + D) - (W + D)| / |D|, by layer."""

    lost: float  # of the whole adapter
    drowned: Mapping[str, float]  # the layers that lost more than DROWNED, the worst first

    def __str__(self) -> str:
        text = f"rounding moved the weights by {self.lost:.1%} of what training did"
        if not self.drowned:
            return text
        named = ", ".join(f"{path} {share:.0%}" for path, share in list(self.drowned.items())[:3])
        return f"{text}; {len(self.drowned)} layers are drowned in it: {named}{' ...' * (len(self.drowned) > 3)}"


def rounding(noted: Mapping[str, Mapping[str, Any]]) -> Rounding:
    """Sum up what a merge noted, path -> {error, update}; layers that were not trained are left out."""
    shares = {path: each["error"] / each["update"] for path, each in noted.items() if each["update"]}
    error, update = (
        math.fsum(each[key] ** 2 for each in noted.values() if each["update"]) for key in ("error", "update")
    )
    worst = sorted((path for path in shares if shares[path] > DROWNED), key=lambda path: -shares[path])
    return Rounding(math.sqrt(error / update) if update else 0.0, {path: shares[path] for path in worst})
