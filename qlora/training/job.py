"""The training job: everything that the loop works on, and the result of one optimizer step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from qlora.data.batching.collate import Batch, collate
from qlora.data.batching.sampler import Sampler
from qlora.data.types import Example
from qlora.distributed.processes import Processes
from qlora.training import Optim, Train
from qlora.training.checkpoint import Checkpoints
from qlora.training.loss_scale import LossScale
from qlora.training.nonfinite import NonFiniteGuard
from qlora.training.objectives.comparison_step import ComparisonStep
from qlora.training.oom_recovery import OomRecovery
from qlora.training.run_log import Log
from qlora.training.signals import StopSignal

AnswerPrompts = Callable[[bool], list[dict[str, str]]]  # whether the base answers too -> prompt, answer, base of each


@dataclass(frozen=True)
class Job:
    """Model, optimizer, data and settings of a run, and the services that its loop calls."""

    model: nn.Module  # a TokenLoss, wrapped by the strategy
    trainable: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    train_examples: Sequence[Example]
    eval_examples: Sequence[Example]
    data_order: str  # of the sequences in an epoch: data.order
    settings: Train
    optim: Optim
    total_steps: int
    processes: Processes
    micro_batch_sizes: Sequence[int]  # sequences of a micro-batch, by rank
    log: Log
    checkpoints: Checkpoints
    stop_signal: StopSignal
    non_finite_guard: NonFiniteGuard = field(default_factory=NonFiniteGuard)
    oom_recovery: OomRecovery = field(default_factory=OomRecovery)
    scales_loss: bool = False  # whether gradients pass through float16
    comparison: ComparisonStep | None = None  # of an objective that compares answers
    answer_prompts: AnswerPrompts | None = None  # of train.sample_prompts

    @property
    def collate(self) -> Callable[[Sequence[Example], int], Batch]:
        """Examples and a pad id -> their micro-batch."""
        return collate if self.comparison is None else self.comparison.collate

    @cached_property
    def sampler(self) -> Sampler:
        """Which sequences a step trains on."""
        return Sampler(self.data_order, self.settings.global_batch, self.settings.seed)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all ranks."""

    loss: float  # a sum
    weight: int  # what divides it: trained tokens, or pairs
    trained_tokens: int
    tokens: int  # without padding
    sums: Sequence[float]  # the other SUMS of an objective that compares answers
    grad_norm: float
    seconds: float
    is_overflow: bool = False  # whether it was skipped since the loss scale was too large
    next_scale: LossScale | None = None  # where products are in float16
