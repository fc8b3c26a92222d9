"""A micro-batch of compared answers beside its conversations one by one: sums, rewards, KL, evaluation, warning."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
from support.preferences import PAIRED, comparison_job

from qlora.data.batching.collate import collate
from qlora.data.compared import mismatched_of
from qlora.data.pairs import sides_of
from qlora.data.types import CHOSEN, IGNORED, ROLES, Example
from qlora.distributed.single import Single
from qlora.training.job import Job
from qlora.training.objectives.comparison_eval import evaluate_answers
from qlora.training.objectives.comparison_step import SUMS, ComparisonStep
from qlora.training.objectives.side_batch import SideBatch

Jobs = Callable[..., Job]
COUNT = 5  # examples of a micro-batch: KTO has three chosen and two rejected ones
BETA = 0.3


@pytest.fixture(scope="module")
def jobs(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    folder = tmp_path_factory.mktemp("steps")
    return cache(
        lambda kind, *settings: comparison_job(zoo("llama"), folder, kind, f"objective.beta={BETA}", *settings)
    )


def step_of(job: Job) -> tuple[ComparisonStep, Sequence[Example], SideBatch]:
    assert job.comparison is not None
    examples = [job.train_examples[number] for number in range(COUNT)]
    job.comparison.model.eval()
    return job.comparison, examples, job.comparison.collate(examples, 0)


@torch.no_grad()
def log_prob(step: ComparisonStep, conversation: Example) -> float:
    """Of its trained tokens, as the loss of supervised training has it."""
    return -float(step.model(*collate([conversation], 0).arguments))


def conversations(examples: Sequence[Example], role: int) -> list[Example]:
    sides = [zip(sides_of(example), example.sides, strict=True) for example in examples]
    return [conversation for pair in sides for conversation, side in pair if side.role == role]


def rewards(step: ComparisonStep, answers: Sequence[Example], kind: str) -> list[float]:
    own = [log_prob(step, answer) for answer in answers]
    if kind in ("orpo", "simpo"):
        return [BETA * value / answer.trained_tokens() for value, answer in zip(own, answers, strict=True)]
    with step.reference():
        reference = [log_prob(step, answer) for answer in answers]
    return [BETA * (value - other) for value, other in zip(own, reference, strict=True)]


@pytest.mark.parametrize("kind", [*PAIRED, "kto"])
def test_sums_and_metrics_are_those_of_the_conversations_one_by_one(jobs: Jobs, kind: str) -> None:
    step, examples, batch = step_of(jobs(kind))
    with torch.no_grad():
        sums = dict(zip(SUMS, step.sums(step.model, batch, None).tolist(), strict=True))
    values = {}
    for role, name in enumerate(ROLES):
        answers = conversations(examples, role)
        values[name] = rewards(step, answers, kind)
        assert sums[name] == len(answers) and sums[f"{name}_tokens"] == sum(a.trained_tokens() for a in answers)
        assert sums[f"{name}_reward"] == pytest.approx(sum(values[name]), rel=1e-3, abs=1e-4)
        assert sums[f"{name}_log_prob"] == pytest.approx(sum(log_prob(step, a) for a in answers), rel=1e-4)
    assert batch.units == COUNT
    line = step.metrics({**sums, "units": batch.units})
    means = [sum(values[name]) / len(values[name]) for name in ROLES]
    assert line["margin"] == pytest.approx(means[0] - means[1], rel=1e-3, abs=1e-4)
    if kind in PAIRED:
        preferred = [a > b for a, b in zip(*values.values(), strict=True)]
        assert sums["correct"] == sum(preferred) and line["accuracy"] == sum(preferred) / COUNT
        assert 0 < sum(preferred) < COUNT or kind not in ("orpo", "simpo")


def test_cross_entropy_beside_an_objective_is_per_learned_token(jobs: Jobs) -> None:
    for kind, settings, weight in (("dpo", ("objective.sft_weight=0.5",), 0.5), ("orpo", (), 1.0)):
        step, examples, batch = step_of(jobs(kind, *settings))
        chosen = conversations(examples, CHOSEN)
        if kind == "orpo":  # of the whole conversation; its first token is not predicted
            chosen = [dataclasses.replace(item, labels=item.input_ids) for item in chosen]
        learned, tokens = sum(log_prob(step, item) for item in chosen), sum(item.trained_tokens() for item in chosen)
        assert batch.learned_tokens == batch.counts[-1] == tokens
        with torch.no_grad():
            with_sft, without = (step.sums(step.model, batch, counts)[0] for counts in ((7, 1, 2, 90), None))
            per_pair = float(without) / COUNT
        assert float(with_sft - without) == pytest.approx(-weight * learned * 7 / 90, rel=1e-3)
        evaluation = evaluate_answers(step, examples, 2, Single())
        assert evaluation is not None
        assert evaluation.loss == pytest.approx(per_pair - weight * learned / tokens, rel=1e-3)


def test_the_kl_is_of_prompts_with_the_answer_before(jobs: Jobs) -> None:
    step, examples, batch = step_of(jobs("kto"))
    mismatched = [sides_of(other)[0] for example in examples if (other := mismatched_of(example))]
    assert len(mismatched) == COUNT
    answers = [item.input_ids[item.labels != IGNORED].tolist() for item in mismatched]
    own = [item.input_ids[item.labels != IGNORED].tolist() for item in examples]
    assert answers[1:] == own[:-1]
    expected = sum(rewards(step, mismatched, "kto")) / BETA
    assert step.kl_sums(batch).tolist() == pytest.approx([expected, COUNT], rel=1e-3, abs=1e-4)
    step.set_kl((-3.0, 2.0))
    assert step.kl == 0.0
    step.set_kl((3.0, 2.0))
    assert step.kl == 1.5
    with torch.no_grad():
        sums = dict(zip(SUMS, step.sums(step.model, batch, None).tolist(), strict=True))
    assert step.metrics({**sums, "units": COUNT})["kl"] == 1.5
    evaluation = evaluate_answers(step, examples, 2, Single())
    assert evaluation is not None and step.kl == pytest.approx(max(0.0, expected / COUNT), rel=1e-3)
    with torch.no_grad():
        losses = step.sums(step.model, batch, None)[0]
    assert evaluation.loss == pytest.approx(float(losses) / COUNT, rel=1e-4)


def test_neither_the_reference_nor_the_kl_has_dropout(jobs: Jobs) -> None:
    step, _, batch = step_of(jobs("kto", "adapter.dropout=0.5"))
    in_training = dataclasses.replace(step, reference=nullcontext)  # the model itself, which has dropout
    expected = in_training.reference_log_probs(batch), step.kl_sums(batch)
    step.model.train()
    for actual, value in zip((in_training.reference_log_probs(batch), step.kl_sums(batch)), expected, strict=True):
        torch.testing.assert_close(actual, value)
    assert step.model.training


def test_a_fall_of_chosen_answers_is_warned_of_once(jobs: Jobs) -> None:
    step = dataclasses.replace(step_of(jobs("dpo"))[0], first_log_prob=None)
    assert step.warning(-10.0) is None and step.warning(-10.9) is None and step.warning(None) is None
    assert "less likely (log-probability -10.0 -> -11.1)" in str(step.warning(-11.1))
    assert step.warning(-20.0) is None
    longer = dataclasses.replace(step, first_log_prob=-100.0)
    assert longer.warning(-101.9) is None and longer.warning(-102.1) is not None
