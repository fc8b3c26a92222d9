"""The loop: what a micro-batch, a step and a run are, and the settings of all three.

A micro-batch is one forward and backward of one process; a step is one optimizer step over all processes, global_batch
rows; a run is steps. What a step reads and how fast it learns are pure functions of (seed, step).
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from qlora.config import Between, KindOf, Section, setting
from qlora.utils.registry import Registry

OPTIMIZERS = Registry(
    "optim.kind",
    adamw="qlora.training.optimizers:Adamw",  # float32 moments                                    arXiv:1711.05101
    hosted_adamw="qlora.training.optimizers:OffloadedAdamwKind",  # float32 moments that wait in main memory
    adamw_8bit="qlora.training.optimizers:Adamw8bit",  # moments in 8 bits                         arXiv:2110.02861
    paged_adamw_32bit="qlora.training.optimizers:PagedAdamw32bit",  # moments may move to the host arXiv:2305.14314
    paged_adamw_8bit="qlora.training.optimizers:PagedAdamw8bit",  # both
)
SCHEDULES = Registry(
    "optim.schedule",
    constant="qlora.training.schedule:constant",
    linear="qlora.training.schedule:linear",
    cosine="qlora.training.schedule:cosine",
)

Tracker = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]
Beta = Annotated[float, Between(ge=0, lt=1)]
Steps = Annotated[int, Between(ge=0)]
Share = Annotated[float, Between(ge=0, lt=1)]


class Optim(Section):
    """How the trainable weights move."""

    kind: Annotated[str, KindOf(OPTIMIZERS)] = setting(
        "paged_adamw_32bit", "adamw | hosted_adamw | adamw_8bit | paged_adamw_32bit | paged_adamw_8bit"
    )
    learning_rate: float = setting(2e-4, "at its peak", gt=0)
    schedule: Annotated[str, KindOf(SCHEDULES)] = setting("constant", "after the warm-up: constant | linear | cosine")
    warmup: Steps | Share = setting(0.03, "below 1 a share of the steps, else steps")
    weight_decay: float = setting(0.0, "AdamW's decay, scaled by the learning rate", ge=0)
    betas: tuple[Beta, Beta] = setting((0.9, 0.999), "decay of AdamW's two moments")
    max_grad_norm: float | None = setting(0.3, "longer gradients are scaled down to it; null: never", gt=0)
    loraplus_ratio: float | None = setting(None, "learning rate of B over that of A (LoRA+); null: the same", gt=0)


class Train(Section):
    """How long, how much at a time, and what is kept."""

    output: str = setting("runs/example", "folder of the run", min_length=1)
    epochs: float = setting(1.0, "times each kept row is seen; or max_steps", gt=0, unsaid=True)
    max_steps: int | None = setting(None, "optimizer steps, in place of epochs", ge=1)
    micro_batch: int = setting(1, "rows per process in one forward and backward", ge=1)
    global_batch: int = setting(16, "rows in one optimizer step over all processes; accumulation follows from it", ge=1)
    seed: int = setting(0, "order of rows, dropout and the adapter's start", ge=0, le=2**32 - 1)
    log_every: int = setting(1, "steps between lines of metrics", ge=1)
    eval_every: int | None = setting(None, "steps between evaluations; null: only before and after", ge=1)
    save_every: int | None = setting(None, "steps between checkpoints; null: only at the end", ge=1)
    keep: int = setting(3, "checkpoints that stay; older ones go", ge=1)
    early_stop: int | None = setting(None, "evaluations without improvement before the run ends; null: never", ge=1)
    resume: str = setting(
        "auto", "auto (the newest checkpoint in output, if any) | never | a checkpoint folder", min_length=1
    )
    report_to: tuple[Tracker, ...] = setting(
        (), "trackers beside metrics.jsonl: tensorboard, wandb, trackio, mlflow, ..."
    )
    compile: bool = setting(False, "torch.compile each layer: quicker steps after a slow first one")
    deterministic: bool = setting(False, "the same bits in every run on the same machine, at some speed")

    def idle(self) -> Mapping[str, str]:
        """A number of steps says how long the run is."""
        return {"epochs": "train.max_steps says how long the run is"} if self.max_steps is not None else {}
