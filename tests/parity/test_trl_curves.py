"""TRL as reference over 20 steps: losses, margins and accuracies of its trainers' own loops, for every objective."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.test_trl import OPTIONS, concatenated, peft_model, rows, token_rows
from support.preferences import comparison_job
from support.small_runs import metrics
from transformers import AutoTokenizer

from qlora.data.pairs import sides_of
from qlora.data.types import CHOSEN, Example
from qlora.training import OPTIMIZERS
from qlora.training.checkpoint import Position
from qlora.training.job import Job
from qlora.training.loop import fit
from qlora.training.optimizers import parameter_groups

trl = pytest.importorskip("trl")
pytest.importorskip("peft")

Zoo = Callable[..., Path]
STEPS, BATCH, TOLERANCE = 20, 4, 1e-3
RATE, CLIP = 2e-3, 1.0
SETTINGS: dict[str, tuple[dict[str, float], dict[str, Any]]] = {  # ours and TRL's, where they have other names
    "dpo": ({"beta": 0.3}, {"beta": 0.3}),
    "ipo": ({"beta": 0.3}, {"beta": 0.3, "loss_type": ["ipo"]}),
    "orpo": ({"beta": 0.4}, {"beta": 0.4}),
    "simpo": ({"beta": 2.0, "gamma": 0.8}, {"beta": 2.0, "simpo_gamma": 0.8, "loss_type": "simpo", "cpo_alpha": 0.0}),
    "kto": ({"beta": 0.3}, {"beta": 0.3}),
}


def classes(kind: str) -> tuple[Any, Any]:
    """TRL's configuration and trainer of a kind."""
    if kind in ("dpo", "ipo"):
        return trl.DPOConfig, trl.DPOTrainer
    if kind == "kto":
        return trl.KTOConfig, trl.KTOTrainer
    name = {"orpo": "orpo", "simpo": "cpo"}[kind]
    package = __import__(f"trl.experimental.{name}", fromlist=[name])
    return getattr(package, f"{name.upper()}Config"), getattr(package, f"{name.upper()}Trainer")


def inputs_of(kind: str, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """A step's examples as the trainer's collator gives them."""
    pairs = [list(side) for side in zip(*(sides_of(example) for example in examples), strict=True)]
    if kind in ("orpo", "simpo"):
        return concatenated(pairs)
    inputs = token_rows([example for side in pairs for example in side])
    if kind == "kto":
        inputs["label"] = torch.tensor([example.sides[0].role == CHOSEN for example in examples])
        inputs |= {
            f"KL_{name}": value
            for name, value in token_rows([example.mismatched for example in examples]).items()  # type: ignore[attr-defined]
        }
    return inputs


def steps_of(job: Job) -> list[list[Example]]:
    """The examples of each step."""
    return [
        [job.train_examples[int(i)] for i in job.sampler.indices(job.train_examples, step)] for step in range(STEPS)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
def test_twenty_steps_are_those_of_trl(zoo: Zoo, tmp_path: Path, kind: str) -> None:
    base, (own, options) = zoo("llama"), SETTINGS[kind]
    overrides = [f"objective.{key}={value}" for key, value in own.items()]
    overrides += [f"train.max_steps={STEPS}", f"train.global_batch={BATCH}", f"optim.max_grad_norm={CLIP}"]
    overrides += ["optim.schedule=constant", "optim.warmup=0", f"optim.learning_rate={RATE}"]
    job = comparison_job(base, tmp_path, kind, *overrides)
    config, trainer_class = classes(kind)

    class SameRows(trainer_class):  # type: ignore[misc]
        """The trainer on the steps of the job, in its order."""

        def get_train_dataloader(self) -> Any:
            batches = [inputs_of(kind, step) for step in steps_of(job)]
            return torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]

    arguments = config(
        str(tmp_path / "trl"), **OPTIONS, **options, max_steps=STEPS, learning_rate=RATE, max_grad_norm=CLIP,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", weight_decay=0.0, disable_tqdm=True,
    )  # fmt: skip
    model = peft_model(job, base, tmp_path / "adapter")
    trainer = SameRows(
        model, args=arguments, train_dataset=rows(kind), processing_class=AutoTokenizer.from_pretrained(base)
    )
    if "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")
    trainer.train()
    expected = [line for line in trainer.state.log_history if "loss" in line]
    groups = parameter_groups(job.trainable, RATE, None)
    fit(replace(job, optimizer=OPTIMIZERS["adamw"].build(groups, (0.9, 0.999), 0.0)), Position())
    lines = metrics(tmp_path / "run")
    assert len(lines) == len(expected) == STEPS
    for name, theirs in {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}.items():
        steps = [(line[name], other[theirs]) for line, other in zip(lines, expected, strict=True) if theirs in other]
        if not (name == "accuracy" and kind == "kto"):  # single answers have none
            assert len(steps) > STEPS / 2  # a step whose labels are all alike has no margin
        assert all(abs(own - other) <= TOLERANCE for own, other in steps), (name, steps)
    assert abs(lines[-1]["loss"] - lines[0]["loss"]) > 10 * TOLERANCE  # something was learned
