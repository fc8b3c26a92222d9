"""Training: the settings of optimizer and loop, and the tables of optimizers and learning rate schedules.

A micro-batch is one forward and backward on one rank; a step is one optimizer step over all ranks, of global_batch
sequences. The sequences of a step and its learning rate are pure functions of (seed, step).
"""

from collections.abc import Mapping
from os.path import expanduser
from typing import Annotated, Literal

from qlora.config import Between, KindOf, Section, Validator, setting
from qlora.utils.registry import Registry

OPTIMIZERS = Registry(
    "optim.kind",
    adamw="qlora.training.optimizers:Adamw",  # float32 moments                                    arXiv:1711.05101
    offloaded_adamw="qlora.training.optimizers:OffloadedAdamw",  # float32 moments in host memory
    adamw_8bit="qlora.training.optimizers:Adamw8bit",  # 8-bit moments                             arXiv:2110.02861
    paged_adamw_32bit="qlora.training.optimizers:PagedAdamw32bit",  # moments may move to the host arXiv:2305.14314
    paged_adamw_8bit="qlora.training.optimizers:PagedAdamw8bit",  # 8-bit moments that may move to the host
)
RENAMED_OPTIMIZERS = {
    "hosted_adamw": "offloaded_adamw"
}  # old name -> name; recipes and checkpoints may have the old one
SCHEDULES = Registry(
    "optim.schedule",
    constant="qlora.training.schedule:constant",
    linear="qlora.training.schedule:linear",
    cosine="qlora.training.schedule:cosine",
)

Tracker = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]
Beta = Annotated[float, Between(ge=0, lt=1)]
Steps = Annotated[int, Between(ge=0)]
Fraction = Annotated[float, Between(ge=0, lt=1)]
Prompt = Annotated[str, Between(min_length=1)]


def jsonl_file(path: str) -> str:
    """The expanded path of a JSONL file. ValueError for another text."""
    if not path.endswith(".jsonl"):
        raise ValueError(
            f"found {path[:60]!r}; allowed: a list of texts, or one file that ends in .jsonl. Write [TEXT]."
        )
    return expanduser(path)


class Optim(Section):
    """Optimizer, learning rate schedule and gradient clipping."""

    kind: Annotated[str, KindOf(OPTIMIZERS)] = setting(
        "paged_adamw_32bit", "adamw | offloaded_adamw | adamw_8bit | paged_adamw_32bit | paged_adamw_8bit"
    )
    learning_rate: float = setting(2e-4, "peak learning rate", gt=0)
    schedule: Annotated[str, KindOf(SCHEDULES)] = setting("constant", "after warm-up: constant | linear | cosine")
    warmup: Steps | Fraction = setting(0.03, "below 1 a fraction of all steps, else a number of steps")
    weight_decay: float = setting(0.0, "AdamW's weight decay, scaled by the learning rate", ge=0)
    betas: tuple[Beta, Beta] = setting((0.9, 0.999), "decay of AdamW's two moments")
    max_grad_norm: float | None = setting(0.3, "gradients are clipped to this norm; null: no clipping", gt=0)
    loraplus_ratio: float | None = setting(None, "learning rate of B over that of A (LoRA+); null: the same", gt=0)


class Train(Section):
    """Length, batch sizes, logging, evaluation and checkpoints of a run."""

    output: Annotated[str, Validator(expanduser)] = setting("runs/example", "run folder", min_length=1)
    epochs: float = setting(1.0, "passes over the training data; or max_steps", gt=0, nullable=True)
    max_steps: int | None = setting(None, "optimizer steps, instead of epochs", ge=1)
    micro_batch: int = setting(1, "sequences per process in one forward and backward", ge=1)
    global_batch: int = setting(16, "sequences in one optimizer step over all processes; sets accumulation", ge=1)
    seed: int = setting(0, "data order, dropout and adapter initialization", ge=0, le=2**32 - 1)
    log_every: int = setting(1, "steps between lines of metrics", ge=1)
    eval_every: int | None = setting(None, "steps between evaluations; null: only before and after training", ge=1)
    save_every: int | None = setting(None, "steps between checkpoints; null: only the final adapter", ge=1)
    keep: int = setting(3, "checkpoints to keep; older ones are deleted", ge=1)
    early_stop: int | None = setting(None, "evaluations without improvement before the run ends; null: never", ge=1)
    early_stop_on: Literal["loss", "accuracy"] = setting(
        "loss", "what has to improve, on held-out examples: loss | accuracy (of pairs); default loss", nullable=True
    )
    resume: Annotated[str, Validator(expanduser)] = setting(
        "auto", "auto (the newest checkpoint in output, if any) | never | a checkpoint folder", min_length=1
    )
    sample_prompts: Annotated[str, Validator(jsonl_file)] | tuple[Prompt, ...] = setting(
        (),
        "prompts that are answered at each evaluation: a list of texts, or one JSONL file with `prompt` or `messages`",
    )
    report_to: tuple[Tracker, ...] = setting(
        (), "trackers in addition to metrics.jsonl: tensorboard, wandb, trackio, mlflow, ..."
    )
    compile: bool = setting(False, "torch.compile each layer: faster steps after a slow first one")
    deterministic: bool = setting(False, "bit-identical runs on the same machine, at some cost in speed")

    def without_effect(self) -> Mapping[str, str]:
        """`epochs` has no effect where `max_steps` is set, `early_stop_on` where no run ends early."""
        length = {"epochs": "train.max_steps sets the length of the run"} if self.max_steps is not None else {}
        return length | ({"early_stop_on": "train.early_stop is not set"} if self.early_stop is None else {})
