"""TRL as reference: on the same rows, the loss and the adapter's gradients of its trainers, for every objective."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.preferences import PAIRS, comparison_job
from support.step_gradients import gradients
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.adapters import peft_files
from qlora.adapters.lora import Lora
from qlora.data.pairs import sides_of
from qlora.data.types import CHOSEN, IGNORED, Example
from qlora.training.job import Job
from qlora.training.loop import backward
from qlora.training.objectives.side_batch import SideBatch

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

Zoo = Callable[..., Path]
TOLERANCE = 1e-5
OPTIONS = {"report_to": [], "per_device_train_batch_size": PAIRS, "gradient_checkpointing": False, "use_cpu": True}
OPTIONS |= {"bf16": False}


def padded(rows: Sequence[np.ndarray[Any, Any]], value: int) -> Tensor:
    """Rows [B, T] padded on the right."""
    length = max(len(row) for row in rows)
    return torch.tensor([[*row.tolist(), *[value] * (length - len(row))] for row in rows])


def sides(job: Job) -> list[list[Example]]:
    """The chosen and the rejected conversations of a job's pairs, in the order of its step."""
    pairs = [sides_of(job.train_examples[index]) for index in range(len(job.train_examples))]
    return [list(side) for side in zip(*pairs, strict=True)]


def token_rows(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Ids, padding mask and the mask of trained tokens, as TRL's collators give them."""
    return {
        "input_ids": padded([example.input_ids for example in examples], 0),
        "attention_mask": padded([np.ones(len(example)) for example in examples], 0).long(),
        "completion_mask": padded([example.labels != IGNORED for example in examples], 0).long(),
    }


def peft_model(job: Job, base: Path, folder: Path) -> Any:
    """The job's model with its adapter in PEFT; the adapter trains."""
    identity = peft_files.BaseIdentity(str(base), None, "0" * 64)
    peft_files.write(folder, job.processes.unwrap(job.model).model, Lora(4, 8.0, 0.0), identity)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, folder, is_trainable=True)


def trl_gradient(model: Any, job: Job) -> Tensor:
    """The adapter's gradients in the order of the job's tensors."""
    parameters = dict(model.named_parameters())
    names = [f"base_model.model.{name[:-2]}.lora_{name[-1]}.default.weight" for name in job.trainable]
    return torch.cat([parameters[name].grad.flatten() for name in names])


def own_loss(job: Job) -> float:
    """The loss of the job's one step."""
    batch = job.collate([job.train_examples[index] for index in range(len(job.train_examples))], 0)
    assert isinstance(batch, SideBatch)
    loss = float(backward(job, batch, batch.counts)[0]) / batch.counts[0]
    for parameter in job.trainable.values():
        parameter.grad = None
    return loss


def assert_same_step(job: Job, trainer: Any, loss: Tensor) -> None:
    loss.backward()
    assert float(loss) == pytest.approx(own_loss(job), rel=TOLERANCE)
    expected, actual = trl_gradient(trainer.model, job), gradients(job, micro_batch=PAIRS)
    assert float((actual - expected).norm() / expected.norm()) <= TOLERANCE


def rows(kind: str) -> Any:
    fields = {"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]}
    labeled = {"prompt": ["a", "b"], "completion": ["c", "d"], "label": [True, False]}
    return datasets.Dataset.from_dict(labeled if kind == "kto" else fields)


@pytest.mark.sample(of=3)
@pytest.mark.parametrize(
    ("kind", "settings", "options"),
    [
        ("dpo", ("objective.beta=0.3",), {"beta": 0.3}),
        ("dpo", ("objective.sft_weight=0.5",), {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
        ("ipo", (), {"loss_type": ["ipo"]}),
    ],
    ids=["dpo", "dpo with sft", "ipo"],
)
def test_dpo_trainer(zoo: Zoo, tmp_path: Path, kind: str, settings: tuple[str, ...], options: dict[str, Any]) -> None:
    base = zoo("llama")
    job = comparison_job(base, tmp_path, kind, *settings)
    model = peft_model(job, base, tmp_path / "adapter")
    arguments = trl.DPOConfig(str(tmp_path / "trl"), **OPTIONS, **options)
    trainer = trl.DPOTrainer(
        model, args=arguments, train_dataset=rows(kind), processing_class=AutoTokenizer.from_pretrained(base)
    )
    if "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")  # a copy of the adapter; without it the reference is the base
    inputs = token_rows([example for side in sides(job) for example in side])
    assert_same_step(job, trainer, trainer._compute_loss(trainer.model, inputs, False))


def concatenated(pairs: Sequence[Sequence[Example]]) -> dict[str, Tensor]:
    """Chosen and rejected conversations as the trainers of ORPO and CPO read them."""
    batch = {}
    for name, examples in zip(("chosen", "rejected"), pairs, strict=True):
        part = token_rows(examples)
        batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"] = part["input_ids"], part["attention_mask"]
        batch[f"{name}_labels"] = part["input_ids"].masked_fill(part["completion_mask"] == 0, IGNORED)
    return batch


def test_cpo_trainer_as_simpo(zoo: Zoo, tmp_path: Path) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    base = zoo("llama")
    settings = ("objective.beta=2.0", "objective.gamma=0.8", "objective.sft_weight=0.3")
    job = comparison_job(base, tmp_path, "simpo", *settings)
    model = peft_model(job, base, tmp_path / "adapter")
    arguments = CPOConfig(str(tmp_path / "trl"), loss_type="simpo", beta=2.0, simpo_gamma=0.8, cpo_alpha=0.3, **OPTIONS)
    trainer = CPOTrainer(
        model, arguments, train_dataset=rows("simpo"), processing_class=AutoTokenizer.from_pretrained(base)
    )
    assert_same_step(job, trainer, trainer.get_batch_loss_metrics(trainer.model, concatenated(sides(job)))[0])


def test_orpo_trainer(zoo: Zoo, tmp_path: Path) -> None:
    """Its cross entropy is over prompts too."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    base = zoo("llama")
    job = comparison_job(base, tmp_path, "orpo", "objective.beta=0.4")
    model = peft_model(job, base, tmp_path / "adapter")
    arguments = ORPOConfig(str(tmp_path / "trl"), beta=0.4, **OPTIONS)
    trainer = ORPOTrainer(
        model, args=arguments, train_dataset=rows("orpo"), processing_class=AutoTokenizer.from_pretrained(base)
    )
    assert_same_step(job, trainer, trainer.get_batch_loss_metrics(trainer.model, concatenated(sides(job)))[0])


def beside(own: Example, other: Example) -> Example:
    """The prompt of one conversation with the answer of another, as TRL puts them together."""
    prompt, answer = (int((example.labels != IGNORED).argmax()) for example in (own, other))
    ids, labels = (
        np.concatenate([first[:prompt], second[answer:]])
        for first, second in ((own.input_ids, other.input_ids), (own.labels, other.labels))
    )
    return Example("", ids, labels)


def test_kto_trainer(zoo: Zoo, tmp_path: Path) -> None:
    base = zoo("llama")
    settings = ("objective.beta=0.3", "objective.desirable_weight=1.5", "objective.undesirable_weight=0.5")
    job = comparison_job(base, tmp_path, "kto", *settings)
    model = peft_model(job, base, tmp_path / "adapter")
    weights = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    trainer = trl.KTOTrainer(
        model,
        args=trl.KTOConfig(str(tmp_path / "trl"), **OPTIONS, **weights),
        train_dataset=rows("kto"),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    if "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")
    examples: Any = job.train_examples[:]
    inputs = token_rows([side for example in examples for side in sides_of(example)])
    inputs["label"] = torch.tensor([example.sides[0].role == CHOSEN for example in examples])
    own = [side for example in examples for side in sides_of(example)]
    others = token_rows([beside(one, other) for one, other in zip(own, [own[-1], *own[:-1]], strict=True)])
    inputs |= {f"KL_{name}": value for name, value in others.items()}
    loss = trainer._compute_loss(trainer.model, inputs, False)
    gradients(job, micro_batch=PAIRS)  # estimates the KL of the step
    assert job.comparison is not None
    assert job.comparison.kl == pytest.approx(trainer._metrics["train"]["kl"][-1], abs=1e-5)
    assert_same_step(job, trainer, loss)


def test_the_sides_of_a_job_are_its_trained_answers(zoo: Zoo, tmp_path: Path) -> None:
    job = comparison_job(zoo("llama"), tmp_path, "dpo")
    for example, *conversations in zip(job.train_examples, *sides(job), strict=True):
        tokens = sum(conversation.trained_tokens() for conversation in conversations)
        assert tokens == example.trained_tokens() and example.sides[0].role == CHOSEN
