"""Evaluation under an objective that compares answers: its loss, accuracy, margin and log-probabilities."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from qlora.data.batching.collate import Batch
from qlora.data.types import Example
from qlora.distributed.processes import Processes
from qlora.training.eval_loss import Evaluation, EvaluationPass
from qlora.training.objectives.comparison_step import SUMS, UNITS, ComparisonStep


@dataclass(frozen=True)
class AnswersEvaluation(Evaluation):
    """The mean loss of a pair, or of an answer with a label, and the metrics that training lines have."""

    answers: Mapping[str, float | None]

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """What is logged beside the loss; `accuracy` becomes `eval_accuracy`."""
        return {f"eval_{name}": value for name, value in self.answers.items()}


def evaluate_answers(
    step: ComparisonStep,
    examples: Sequence[Example],
    micro_batch: int,
    processes: Processes,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AnswersEvaluation | None:
    """The evaluation of `examples`, which are split over the ranks, as `evaluate` of supervised training."""

    def measure(batch: Batch) -> Tensor:
        return step.sums(step.model, batch.to(processes.device), None).double()

    evaluation_pass = EvaluationPass(step.model, examples, micro_batch, processes, should_stop, progress)
    if step.objective.needs_kl:
        kl_sums = evaluation_pass.sum(lambda batch: step.kl_sums(batch.to(processes.device)), step.collate)
        if kl_sums is None:
            return None
        step.set_kl(kl_sums)
    values = evaluation_pass.sum(measure, step.collate)
    if values is None:
        return None
    sums = dict(zip(SUMS, values, strict=True))
    units = sums["chosen"] if step.objective.is_paired else sums["chosen"] + sums["rejected"]
    loss = sums["loss"] / max(1.0, units)
    learned, learned_tokens = (sums[f"chosen_{name}"] + sums[f"prompt_{name}"] for name in ("log_prob", "tokens"))
    loss -= step.objective.sft_weight * learned / max(1.0, learned_tokens)
    tokens = int(sums["chosen_tokens"] + sums["rejected_tokens"])
    return AnswersEvaluation(loss, len(examples), tokens, step.metrics({UNITS: units, **sums}))
