"""The certificate of an export: how far the written model is from the trained one, measured on held-out examples."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.data.batching.collate import Batch, collate
from qlora.data.prefix_tree import paths_of
from qlora.data.types import IGNORED, Example
from qlora.errors import QloraError
from qlora.memory.planner.export_and_disk import CERTIFICATE_TOKENS, LOGITS_FRACTION
from qlora.model.lm_head import Head

LOSSY = 0.5  # rounding error over the update, above which a layer is listed


@dataclass(frozen=True)
class Agreement:
    """Trained against written model, over every position of the examples."""

    mean_kl: float  # nats, KL(trained || written)
    top1: float  # share of positions whose most likely token is the same
    max_logit_difference: float
    rows: int
    tokens: int
    trained_loss: float  # nats per trained token of the same examples
    written_loss: float

    def __str__(self) -> str:
        return (
            f"top-1 agreement {100 * self.top1:.2f} %, mean KL {self.mean_kl:.2e}, largest logit difference "
            f"{self.max_logit_difference:.2e}, loss {self.trained_loss:.4f} -> {self.written_loss:.4f}, "
            f"on {self.rows} examples ({self.tokens:,} tokens)"
        )


@dataclass
class _Sums:
    """Sums over positions."""

    kl: float = 0.0
    same_top1: int = 0
    tokens: int = 0
    max_difference: float = 0.0
    trained_loss: float = 0.0
    written_loss: float = 0.0
    targets: int = 0

    def add(self, trained: Tensor, written: Tensor, targets: Tensor) -> None:
        """Float32 logits [N, V] of both models, and the token that follows each position [N]."""
        trained_logs, written_logs = trained.log_softmax(-1), written.log_softmax(-1)
        self.kl += F.kl_div(written_logs, trained_logs, log_target=True, reduction="sum").item()
        self.same_top1 += int((trained.argmax(-1) == written.argmax(-1)).sum())
        self.max_difference = max(self.max_difference, (trained - written).abs().max().item())
        self.trained_loss += F.nll_loss(trained_logs, targets, ignore_index=IGNORED, reduction="sum").item()
        self.written_loss += F.nll_loss(written_logs, targets, ignore_index=IGNORED, reduction="sum").item()
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
    """Run both models on every example and compare their next-token distributions at each position.

    Answers that share a prefix are compared one by one: the written model may not take trees.
    """
    heads, sums, done = (Head(trained), Head(written)), _Sums(), 0
    examples = [path for example in examples for path in paths_of(example)]
    for batch in _batches(examples):
        ids, positions = batch.input_ids.to(device), batch.position_ids.to(device)
        is_token = (torch.arange(ids.shape[1]) < torch.tensor(batch.layout.lengths)[:, None]).to(device)
        trained_states, written_states = (head.hidden_states(ids, positions, batch.layout)[is_token] for head in heads)
        targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED).to(device)[is_token]
        for chunk in torch.arange(len(targets), device=device).split(max(1, heads[0].chunk_rows() // LOGITS_FRACTION)):
            sums.add(
                heads[0].logits_in_model_dtype(trained_states[chunk]),
                heads[1].logits_in_model_dtype(written_states[chunk]),
                targets[chunk],
            )
        done += len(ids)
        report(done, len(examples))
    return Agreement(
        max(0.0, sums.kl / max(1, sums.tokens)),
        sums.same_top1 / max(1, sums.tokens),
        sums.max_difference,
        len(examples),
        sums.tokens,
        sums.trained_loss / max(1, sums.targets),
        sums.written_loss / max(1, sums.targets),
    )


def refuse_high_kl(agreement: Agreement, limit: float | None, problem: str, remedy: str) -> None:
    """QloraError if the mean KL is above `limit`; None: there is no limit. remedy: what to use instead."""
    if limit is not None and not agreement.mean_kl <= limit:
        raise QloraError(
            f"export: mean KL {agreement.mean_kl:.2e} is above the limit {limit:g}: {problem}; nothing was exported. "
            f"Use {remedy}, or --max-kl {just_above(agreement.mean_kl)} to export it anyway."
        )


def just_above(value: float) -> str:
    """A limit that a measured value would not exceed."""
    return f"{value * 1.1:.2g}"


def _batches(examples: Sequence[Example]) -> Iterator[Batch]:
    """Examples by length, in batches of up to CERTIFICATE_TOKENS with padding: a model may be read for each batch."""
    batch: list[Example] = []
    for example in sorted(examples, key=len):
        if batch and (len(batch) + 1) * len(example) > CERTIFICATE_TOKENS:
            yield collate(batch, pad_id=0)
            batch = []
        batch.append(example)
    if batch:
        yield collate(batch, pad_id=0)


@dataclass(frozen=True)
class Rounding:
    """How much of the update rounding to the written dtype removed: |round(W + D) - (W + D)| / |D|."""

    relative_error: float  # of the whole adapter
    lossy_layers: Mapping[str, float]  # layers with more than LOSSY, the worst first

    def __str__(self) -> str:
        text = f"rounding changed the weights by {self.relative_error:.1%} of what training changed"
        if not self.lossy_layers:
            return text
        listed = ", ".join(f"{path} {share:.0%}" for path, share in list(self.lossy_layers.items())[:3])
        more = " ..." * (len(self.lossy_layers) > 3)
        return f"{text}; {len(self.lossy_layers)} layers lose more than {LOSSY:.0%} of their update: {listed}{more}"

    def as_json(self) -> dict[str, Any]:
        """The figures as in certificate.json and `export --json`."""
        return {"lost": self.relative_error, "drowned": dict(self.lossy_layers)}


def summarize_rounding(layers: Mapping[str, Mapping[str, Any]]) -> Rounding:
    """Sum up what a merge measured, path -> {error, update} (norms); layers that were not trained are left out."""
    shares = {path: norms["error"] / norms["update"] for path, norms in layers.items() if norms["update"]}
    error, update = (
        math.fsum(norms[key] ** 2 for norms in layers.values() if norms["update"]) for key in ("error", "update")
    )
    worst = sorted((path for path in shares if shares[path] > LOSSY), key=lambda path: -shares[path])
    return Rounding(math.sqrt(error / update) if update else 0.0, {path: shares[path] for path in worst})
