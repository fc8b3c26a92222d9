"""The certificate: how far the written model is from the one that was trained, measured on rows it never saw."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from qlora.data.types import Example


@dataclass(frozen=True)
class Agreement:
    """Trained against written model, over every position of the rows."""

    mean_kl: float  # nats, KL(trained || written)
    top1: float  # share of positions whose most likely token is the same
    max_logit_difference: float
    rows: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"top-1 agreement {100 * self.top1:.2f} %, mean KL {self.mean_kl:.2e}, largest logit difference "
            f"{self.max_logit_difference:.2e}, on {self.rows} rows ({self.tokens:,} tokens)"
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
    for done, example in enumerate(examples, start=1):
        ids = torch.as_tensor(example.input_ids, dtype=torch.long, device=device)[None]
        ours, theirs = (model(input_ids=ids, use_cache=False).logits[0].float() for model in (trained, written))
        kl += F.kl_div(theirs.log_softmax(-1), ours.log_softmax(-1), log_target=True, reduction="sum").item()
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        largest = max(largest, (ours - theirs).abs().max().item())
        tokens += ids.shape[1]
        report(done, len(examples))
    return Agreement(max(0.0, kl / max(1, tokens)), same / max(1, tokens), largest, len(examples), tokens)
