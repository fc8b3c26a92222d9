"""What the literature on LoRA says about a recipe, given its data: lines that a user may act on or not.

Sources: Dettmers et al. 2023 (QLoRA: adapters in all linear layers; two or three epochs), Schulman et al. 2025 (LoRA
Without Regret: ten times the learning rate of full fine-tuning; about two bits a parameter, a bit a trained token).
"""

from collections.abc import Iterator

from qlora.data.data_report import DataReport
from qlora.recipe.recipe import Recipe

FEW_STEPS, MANY_EPOCHS, LOW_RATE = 20, 5, 5e-5
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "out_proj"}
Counsel = Iterator[tuple[str, str]]  # key of the recipe, what to know


def recommendations(recipe: Recipe, report: DataReport, steps: int, trainable_parameters: int | None) -> Counsel:
    """Settings that the literature would advise against, for a run of `steps` optimizer steps."""
    yield from _length(recipe, report, steps)
    yield from _adapter(recipe, report, trainable_parameters)


def _length(recipe: Recipe, report: DataReport, steps: int) -> Counsel:
    train, rows = recipe.train, max(1, report.packed_rows)
    if steps < FEW_STEPS and train.max_steps is None:
        packed = "; a row is a packed one" if recipe.data.packing else ""
        yield (
            "train.global_batch",
            (
                f"{steps} optimizer steps in all ({rows:,} rows, {train.global_batch} a step{packed}): hardly "
                "enough to learn from. A smaller global_batch, or more epochs"
            ),
        )
    epochs = train.epochs if train.max_steps is None else steps * train.global_batch / rows
    if epochs > MANY_EPOCHS and train.early_stop is None:
        yield (
            "train.epochs",
            (
                f"each row is seen {epochs:.0f} times; from the third on, most fine-tunes learn rows by heart. "
                "train.early_stop ends a run when the held-out loss rises"
            ),
        )
    if not report.eval_rows:
        yield "data.eval_fraction", "no rows are held out: overfitting can't be seen"


def _adapter(recipe: Recipe, report: DataReport, trainable_parameters: int | None) -> Counsel:
    adapter, rate = recipe.adapter, recipe.optim.learning_rate
    if adapter.kind == "full":
        return
    if rate < LOW_RATE:
        yield "optim.learning_rate", f"{rate:g} suits full fine-tuning; LoRA learns best at about ten times as much"
    names = {adapter.targets} if isinstance(adapter.targets, str) else set(adapter.targets or ())
    if names and names <= ATTENTION:
        yield "adapter.targets", "attention alone learns less than all-linear, at any rank"
    if trainable_parameters and report.trained_tokens > 2 * trainable_parameters:
        yield (
            "adapter.rank",
            (
                f"{trainable_parameters:,} adapter parameters hold about two bits each, {report.trained_tokens:,} "
                "trained tokens bring about one each: a higher rank would learn more of them"
            ),
        )
