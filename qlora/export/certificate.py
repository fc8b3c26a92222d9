"""The certificate: how far the written model is from the one that was trained, measured on rows it never saw."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.data.types import IGNORED, Example

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


@torch.no_grad()
def compare(
    trained: nn.Module,
    written: nn.Module,
    examples: Sequence[Example],
    device: torch.device,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Agreement:
    """Run both models on every row and compare their next-token distributions position by position."""
    kl, same, tokens, largest = 0.0, 0, 0, 0.0
    losses, targets = [0.0, 0.0], 0
    for done, example in enumerate(examples, start=1):
        ids = torch.as_tensor(example.input_ids, dtype=torch.long, device=device)[None]
        ours, theirs = (model(input_ids=ids, use_cache=False).logits[0].float() for model in (trained, written))
        kl += F.kl_div(theirs.log_softmax(-1), ours.log_softmax(-1), log_target=True, reduction="sum").item()
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        largest = max(largest, (ours - theirs).abs().max().item())
        tokens += ids.shape[1]
        labels = _targets(example).to(device)
        losses = [sum_ + _loss(logits, labels) for sum_, logits in zip(losses, (ours, theirs), strict=True)]
        targets += int((labels != IGNORED).sum())
        report(done, len(examples))
    mean = [loss / max(1, targets) for loss in losses]
    return Agreement(
        max(0.0, kl / max(1, tokens)), same / max(1, tokens), largest, len(examples), tokens, mean[0], mean[1]
    )


def _targets(example: Example) -> Tensor:
    """What position t should predict, [T - 1]; a document's first token is predicted from nothing."""
    labels = torch.as_tensor(example.labels, dtype=torch.long).clone()
    labels[list(example.starts())] = IGNORED
    return labels[1:]


def _loss(logits: Tensor, targets: Tensor) -> float:
    return F.cross_entropy(logits[:-1], targets, ignore_index=IGNORED, reduction="sum").item()


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
