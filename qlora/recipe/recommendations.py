"""Recommendations from the literature on LoRA for a recipe and its data; a user may follow them or not.

The figures and their sources are in literature.py.
"""

from collections.abc import Iterator

from qlora.data.data_report import DataReport
from qlora.recipe.literature import (
    COMPARED_RATES,
    EPOCHS_OF_SMALL_SET,
    FULL_RATE,
    LARGEST_BATCH,
    LARGEST_RANK,
    OTHER_RATE,
    REGRET,
    SMALL_SET,
    SuggestedRate,
    holds,
    rank_that_holds,
)
from qlora.recipe.recipe import Recipe

FEW_STEPS, MANY_EPOCHS = 20, 5
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "out_proj"}
Recommendations = Iterator[tuple[str, str]]  # key of the recipe, message


def recommend_settings(
    recipe: Recipe,
    report: DataReport,
    steps: int,
    trainable_parameters: int | None,
    suggestion: SuggestedRate | None = None,
) -> Recommendations:
    """Settings that the literature advises against, for a run of `steps` optimizer steps.

    `suggestion`: the learning rate for this base model, if it is known.
    """
    yield from _check_length(recipe, report, steps)
    yield from recommend_adapter_settings(recipe, report, trainable_parameters, suggestion)


def recommend_adapter_settings(
    recipe: Recipe, report: DataReport, trainable_parameters: int | None, suggestion: SuggestedRate | None
) -> Recommendations:
    """Those of them that do not depend on the length of a run: learning rate, targets, dropout, rank."""
    if recipe.adapter.kind != "full":
        yield from _check_rate(recipe, suggestion)
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
    if train.global_batch > LARGEST_BATCH and recipe.adapter.kind != "full":
        yield (
            "train.global_batch",
            f"{train.global_batch} sequences a step: LoRA learns less than full fine-tuning from steps of more than "
            f"{LARGEST_BATCH} ({REGRET}). Use a smaller global_batch",
        )
    limit = EPOCHS_OF_SMALL_SET if report.kept < SMALL_SET else MANY_EPOCHS
    if epochs > limit and train.early_stop is None:
        yield (
            "train.epochs",
            f"each example is trained {epochs:.0f} times; most fine-tunes memorize examples from the third epoch on. "
            "train.early_stop ends a run when the held-out loss rises",
        )
    if not report.eval_rows and not recipe.data.eval_fraction:
        yield "data.eval_fraction", "no examples are held out: overfitting can't be measured"


def _check_rate(recipe: Recipe, suggestion: SuggestedRate | None) -> Recommendations:
    rate, key = recipe.optim.learning_rate, "optim.learning_rate"
    if recipe.objective.sided_format is not None:
        low, high = COMPARED_RATES
        if rate > high:
            kind = recipe.objective.kind
            yield key, f"{rate:g} suits sft; for {kind}, {low:g} to {high:g} keep the model near where it starts"
    elif rate < FULL_RATE:
        yield key, f"{rate:g} suits full fine-tuning; LoRA learns best at about ten times as much"
    elif suggestion and suggestion.fitted and not 1 / OTHER_RATE <= rate / suggestion.rate <= OTHER_RATE:
        yield (
            key,
            f"{rate:g}; for this base model {suggestion.rate:g} is usual ({suggestion.source}). `qlora sweep RECIPE "
            "--find-lr` measures it",
        )


def _check_adapter(recipe: Recipe, report: DataReport, trainable_parameters: int | None) -> Recommendations:
    adapter = recipe.adapter
    targets = {adapter.targets} if isinstance(adapter.targets, str) else set(adapter.targets or ())
    if targets and targets <= ATTENTION:
        yield "adapter.targets", f"attention alone learns less than all-linear, at any rank ({REGRET}). Use all-linear"
    if adapter.dropout and report.kept >= SMALL_SET:
        yield (
            "adapter.dropout",
            f"{adapter.dropout:g} with {report.kept:,} records: dropout helps small sets that are trained often. "
            "Without it a run saves less and is as good; use 0",
        )
    if trainable_parameters and not holds(trainable_parameters, report.trained_tokens):
        rank = rank_that_holds(adapter.rank or 1, trainable_parameters, report.trained_tokens)
        remedy = f"rank {rank} would hold them" if rank <= LARGEST_RANK else "a higher rank would learn more of them"
        yield (
            "adapter.rank",
            f"{trainable_parameters:,} adapter parameters hold about two bits each, {report.trained_tokens:,} "
            f"trained tokens bring about one bit each ({REGRET}): {remedy}",
        )
