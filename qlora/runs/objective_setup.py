"""What an objective that compares answers needs before the first step: its reference, and how a pair is laid out."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from qlora.adapters import peft_files
from qlora.adapters.attach import check_base
from qlora.adapters.reference_adapter import ReferenceAdapter
from qlora.adapters.switch import disable_adapters
from qlora.data.batching.dataset import SequenceDataset
from qlora.data.mismatched import MismatchedAnswers
from qlora.data.types import Example
from qlora.model.checkpoint_fingerprint import checkpoint_sha256
from qlora.model.download import find_model
from qlora.model.lm_head import shares_prefixes
from qlora.model.load_base import Base
from qlora.recipe.recipe import Recipe
from qlora.runs.load_run import read_verified_adapter
from qlora.training.loss import TokenLoss
from qlora.training.objectives import OBJECTIVES, READ_BY
from qlora.training.objectives.comparison_step import ComparisonStep
from qlora.training.side_log_probs import SideLogProbs

BASE = "base"  # objective.reference


def loss_module(recipe: Recipe, base: Base) -> TokenLoss:
    """The model as the function that the recipe's objective trains."""
    return TokenLoss(base.model) if recipe.objective.sided_format is None else SideLogProbs(base.model)


def refuse_other_reference(recipe: Recipe) -> None:
    """AdapterError if the reference in a folder was trained on other weights than the recipe's base model.

    Where it names the same base, its fingerprint is left to `build_comparison`, which knows that of the loaded base.
    """
    objective = recipe.objective
    if objective.kind not in READ_BY["reference"] or objective.reference == BASE:
        return
    file = peft_files.read(Path(objective.reference).expanduser())
    if file.base_sha256 is not None and file.config.get("base_model_name_or_path") != recipe.model.name:
        folder = find_model(recipe.model.name, recipe.model.revision)
        check_base(file, checkpoint_sha256(folder.path), allow_other_base=False)


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
    if kind.learns_prompts:
        log(f"objective {objective.kind}: its cross entropy is over prompts too, as in TRL")
    return ComparisonStep(kind, loss, reference, one_row(recipe, base))


def compared_examples(recipe: Recipe, examples: Sequence[Example], step: ComparisonStep | None) -> Sequence[Example]:
    """Examples as the objective reads them: with mismatched answers, where it estimates a KL."""
    if step is None or not step.objective.needs_kl or not len(examples):
        return examples
    assert isinstance(examples, SequenceDataset)
    return MismatchedAnswers(examples, recipe.data.max_length, recipe.train.global_batch)


def one_row(recipe: Recipe, base: Base) -> bool:
    """Whether both sides of a pair are in one sequence: they share its prompt, or are packed beside each other."""
    return recipe.data.packing or shares_prefixes(base.model)
