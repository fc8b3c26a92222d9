"""Recommendations from the literature on LoRA for a recipe and its data; a user may follow them or not.

Sources: Dettmers et al. 2023 (QLoRA: adapters in all linear layers; two or three epochs), Schulman et al. 2025 (LoRA
Without Regret: ten times the learning rate of full fine-tuning; about two bits a parameter, one bit a trained token).
"""

from collections.abc import Iterator

from qlora.data.data_report import DataReport
from qlora.recipe.recipe import Recipe

FEW_STEPS, MANY_EPOCHS, LOW_RATE = 20, 5, 5e-5
HIGH_RATE = 5e-5  # of objectives that compare answers: they move log-probabilities of whole answers
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "out_proj"}
Recommendations = Iterator[tuple[str, str]]  # key of the recipe, message


def recommend_settings(
    recipe: Recipe, report: DataReport, steps: int, trainable_parameters: int | None
) -> Recommendations:
    """Settings that the literature advises against, for a run of `steps` optimizer steps."""
    yield from _check_length(recipe, report, steps)
    yield from _check_adapter(recipe, report, trainable_parameters)


def _check_length(recipe: Recipe, report: DataReport, steps: int) -> Recommendations:
    train, sequences = recipe.train, max(1, report.packed_rows)
    if steps < FEW_STEPS and train.max_steps is None:
        noun = "packed sequences" if recipe.data.packing else "sequences"
        yield (
            "train.global_batch",
            f"{steps} optimizer steps in all ({sequences:,} {noun}, {train.global_batch} per step) are hardly enough "
            "to learn from. Use a smaller global_batch, or more epochs",
        )
    epochs = train.epochs if train.max_steps is None else steps * train.global_batch / sequences
    if epochs > MANY_EPOCHS and train.early_stop is None:
        yield (
            "train.epochs",
            f"each example is trained {epochs:.0f} times; most fine-tunes memorize examples from the third epoch on. "
            "train.early_stop ends a run when the held-out loss rises",
        )
    if not report.eval_rows and not recipe.data.eval_fraction:
        yield "data.eval_fraction", "no examples are held out: overfitting can't be measured"


def _check_adapter(recipe: Recipe, report: DataReport, trainable_parameters: int | None) -> Recommendations:
    adapter, rate = recipe.adapter, recipe.optim.learning_rate
    if adapter.kind == "full":
        return
    if recipe.objective.sided_format is not None:
        if rate > HIGH_RATE:
            kind = recipe.objective.kind
            yield (
                "optim.learning_rate",
                f"{rate:g} suits sft; for {kind}, 5e-6 to 5e-5 keep the model near where it starts",
            )
    elif rate < LOW_RATE:
        yield "optim.learning_rate", f"{rate:g} suits full fine-tuning; LoRA learns best at about ten times as much"
    targets = {adapter.targets} if isinstance(adapter.targets, str) else set(adapter.targets or ())
    if targets and targets <= ATTENTION:
        yield "adapter.targets", "attention alone learns less than all-linear, at any rank"
    if trainable_parameters and report.trained_tokens > 2 * trainable_parameters:
        yield (
            "adapter.rank",
            f"{trainable_parameters:,} adapter parameters hold about two bits each, {report.trained_tokens:,} "
            "trained tokens bring about one bit each: a higher rank would learn more of them",
        )
