"""One micro-batch under an objective that compares answers: the reference first, then the model, loss and sums.

The loss of a step is the mean over all of its pairs on all ranks, so the split into micro-batches and ranks does not
change the result. What is logged is summed in the same way.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora.data.batching.collate import Batch
from qlora.data.types import CHOSEN, REJECTED, ROLES, Example
from qlora.distributed.processes import Processes
from qlora.training.objectives.answers import Answers, Comparison
from qlora.training.objectives.side_batch import PROMPT, SideBatch, collate_sides
from qlora.utils.send import send

FALLEN = 0.02  # of the log-probability of the chosen answers: a fall that is warned of
UNITS = "units"  # pairs, or answers with a label
SUMS = (  # what a micro-batch adds to a logged line; `correct`: pairs whose chosen reward is higher
    "loss",
    "kl",
    "correct",
    *("chosen", "chosen_reward", "chosen_log_prob", "chosen_tokens"),
    *("rejected", "rejected_reward", "rejected_log_prob", "rejected_tokens"),
    *("prompt_log_prob", "prompt_tokens"),  # where the objective learns prompts
)
SIDES = (CHOSEN, REJECTED)


@dataclass
class ComparisonStep:
    """An objective on its model. reference: inside the context it returns, the model computes what the reference does.

    in_one_row: both sides of a pair are in one sequence; else each is a sequence alone.
    """

    objective: Comparison
    model: nn.Module  # SideLogProbs, not wrapped by a strategy
    reference: Callable[[], AbstractContextManager[Any]]
    in_one_row: bool = True
    kl: float = 0.0  # the estimate of the present step
    # Of the chosen answers, at the first evaluation; NaN once its fall has been warned of.
    first_log_prob: float | None = None

    @property
    def collate(self) -> Callable[[Sequence[Example], int], SideBatch]:
        """Examples with sides and a pad id -> their micro-batch."""
        objective = self.objective
        collate = partial(collate_sides, paired=objective.is_paired, with_prompts=objective.learns_prompts)
        return partial(collate, in_one_row=self.in_one_row)

    def sums(self, model: nn.Module, batch: Batch, counts: Sequence[int] | None) -> Tensor:
        """The SUMS of a micro-batch [len(SUMS)]; only `loss`, a sum over its pairs, has a gradient.

        model: SideLogProbs, as the strategy wraps it. counts: those of the whole step; None: without cross entropy.
        """
        assert isinstance(batch, SideBatch)  # made by `collate`
        reference = self.reference_log_probs(batch) if self.objective.needs_reference else None
        log_probs = model(*batch.arguments)
        chosen, rejected, prompts = (answers_of(batch, role, log_probs, reference) for role in (*SIDES, PROMPT))
        loss = self.objective.losses(chosen, rejected, log_probs.new_tensor(self.kl)).sum()
        if self.objective.sft_weight and counts is not None:
            units, _, _, learned_tokens = counts
            learned = chosen.log_probs.sum() + prompts.log_probs.sum()
            loss = loss - learned * (self.objective.sft_weight * units / max(1, learned_tokens))
        logged = [*self._logged(chosen, rejected), prompts.log_probs.sum().detach(), prompts.tokens.sum()]
        return torch.stack([loss, log_probs.new_tensor(self.kl * batch.units), *logged])

    def warning(self, log_prob: float | None) -> str | None:
        """A warning, once, when the held-out chosen answers have become less likely than at the first evaluation."""
        first = self.first_log_prob
        if first is None:
            self.first_log_prob = log_prob
        if first is None or log_prob is None or not log_prob < first - max(1.0, FALLEN * abs(first)):
            return None
        self.first_log_prob = math.nan
        return (
            f"chosen answers have become less likely (log-probability {first:.1f} -> {log_prob:.1f}): the objective "
            "lowers both sides, the rejected one more. If answers get worse, set objective.sft_weight, or lower "
            "optim.learning_rate"
        )

    def start_step(self, batches: Sequence[Batch], processes: Processes) -> None:
        """Estimate the KL to the reference over the micro-batches of a step on all ranks, if the objective needs it."""
        if self.objective.needs_kl:
            total = sum((self.kl_sums(batch.to(processes.device)) for batch in batches), torch.zeros(()))
            self.set_kl(processes.sum(total).tolist())

    def set_kl(self, sums: Sequence[float]) -> None:
        """Take the estimate from the total of `kl_sums`; it is never negative."""
        self.kl = max(0.0, sums[0] / max(1.0, sums[1]))

    @torch.no_grad()
    def kl_sums(self, batch: Batch) -> Tensor:
        """The sum of log p/q over the mismatched answers of a batch, and their number, float64 [2]."""
        assert isinstance(batch, SideBatch) and batch.mismatched is not None  # of examples with mismatched answers
        reference, training = self.reference_log_probs(batch.mismatched), self.model.training
        log_probs: Tensor = self.model.eval()(*batch.mismatched.arguments)
        self.model.train(training)
        ratios = (log_probs - reference).double()
        return torch.stack([ratios.sum(), torch.full_like(ratios.sum(), len(ratios))])

    @torch.no_grad()
    def reference_log_probs(self, batch: SideBatch) -> Tensor:
        """What the reference gives the answers of a batch [S]; without dropout. Computed here, if not before."""
        if batch.reference is not None:
            return batch.reference
        training = self.model.training
        self.model.eval()
        try:
            with self.reference():
                log_probs: Tensor = self.model(*batch.arguments)
        finally:
            self.model.train(training)
        return log_probs

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float | None]:
        """The metrics of a line from the totals of its steps: means over answers; None where there are none."""
        line: dict[str, float | None] = {}
        for role in ROLES:
            count = sums.get(role, 0.0)
            for name in ("reward", "log_prob", "tokens"):
                line[f"{role}_{name}"] = sums[f"{role}_{name}"] / count if count else None
        high, low = line["chosen_reward"], line["rejected_reward"]
        line["margin"] = None if high is None or low is None else high - low
        if self.objective.is_paired:
            line["accuracy"] = sums["correct"] / sums["chosen"] if sums.get("chosen") else None
        if self.objective.needs_kl:
            line["kl"] = sums["kl"] / sums[UNITS] if sums.get(UNITS) else None
        return line

    @torch.no_grad()
    def _logged(self, chosen: Answers, rejected: Answers) -> list[Tensor]:
        rewards = [self.objective.rewards(answers) for answers in (chosen, rejected)]
        correct = (rewards[0] > rewards[1]).sum() if self.objective.is_paired else torch.zeros(())
        sums = [correct.to(chosen.log_probs)]
        for answers, reward in zip((chosen, rejected), rewards, strict=True):
            count = torch.full_like(sums[0], len(reward))
            sums += [count, reward.sum(), answers.log_probs.sum(), answers.tokens.sum()]
        return sums


def answers_of(batch: SideBatch, role: int, log_probs: Tensor, reference: Tensor | None) -> Answers:
    """The answers of one role in a micro-batch, by their position in it."""
    chosen = [index for index, other in enumerate(batch.roles) if other == role]
    index = send(torch.tensor(chosen, dtype=torch.int64), log_probs.device)
    tokens = send(torch.tensor([float(batch.side_tokens[position]) for position in chosen]), log_probs.device)
    of_reference = None if reference is None else reference.index_select(0, index)
    return Answers(log_probs.index_select(0, index), of_reference, tokens)


def added(total: Mapping[str, float], units: int, sums: Sequence[float]) -> dict[str, float]:
    """Totals and those of one more step: its UNITS, and its SUMS after the loss; none for supervised training."""
    step = zip((UNITS, *SUMS[1:]), (float(units), *sums), strict=True) if sums else ()
    return {**total, **{name: total.get(name, 0.0) + value for name, value in step}}
