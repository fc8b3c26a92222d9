"""What an objective that compares answers needs before the first step: its reference, and how a pair is laid out."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from qlora.adapters.reference_adapter import ReferenceAdapter
from qlora.adapters.switch import disable_adapters
from qlora.data.mismatched import MismatchedAnswers
from qlora.data.types import Example
from qlora.model.lm_head import shares_prefixes
from qlora.model.load_base import Base
from qlora.recipe.recipe import Recipe
from qlora.runs.load_run import read_verified_adapter
from qlora.training.loss import TokenLoss
from qlora.training.objectives import OBJECTIVES
from qlora.training.objectives.comparison_step import ComparisonStep
from qlora.training.side_log_probs import SideLogProbs

BASE = "base"  # objective.reference


def loss_module(recipe: Recipe, base: Base) -> TokenLoss:
    """The model as the function that the recipe's objective trains."""
    return TokenLoss(base.model) if recipe.objective.sided_format is None else SideLogProbs(base.model)


def build_comparison(
    recipe: Recipe, base: Base, loss: TokenLoss, log: Callable[[str], None], start: bool = True
) -> ComparisonStep | None:
    """The step of an objective that compares answers; None for supervised training.

    AdapterError if the reference is of another base. start: the adapter begins as a copy of a reference in a folder.
    """
    objective, model = recipe.objective, base.model
    if objective.sided_format is None:
        return None
    reference = partial(disable_adapters, model)
    kind = OBJECTIVES[objective.kind](objective)
    if kind.needs_reference and objective.reference != BASE:
        file = read_verified_adapter(Path(objective.reference).expanduser(), log)
        adapter = ReferenceAdapter(model, file, base.manifest.sha256)
        if adapter.note:
            log(adapter.note)
        if start:
            adapter.copy_to_trained()
            log(f"objective {objective.kind}: the adapter starts as {objective.reference}, its reference")
        return ComparisonStep(kind, loss, adapter.active, one_row(recipe, base))
    if kind.needs_reference:
        log(f"objective {objective.kind}: the reference is the base, with the adapter switched off")
    return ComparisonStep(kind, loss, reference, one_row(recipe, base))


def compared_examples(recipe: Recipe, examples: Sequence[Example], step: ComparisonStep | None) -> Sequence[Example]:
    """Examples as the objective reads them: with mismatched answers, where it estimates a KL."""
    if step is None or not step.objective.needs_kl or not len(examples):
        return examples
    return MismatchedAnswers(examples, recipe.data.max_length)


def one_row(recipe: Recipe, base: Base) -> bool:
    """Whether both sides of a pair are in one sequence: they share its prompt, or are packed beside each other."""
    return recipe.data.packing or shares_prefixes(base.model)
