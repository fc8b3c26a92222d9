"""What a recipe trains, added to a base model: updates of its matrices and experts, modules to save, tokens."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from qlora.adapters import ADAPTERS
from qlora.adapters.expert_targets import refuse_unused_rank, resolve_expert_rank
from qlora.adapters.full import Full
from qlora.adapters.inject import Injection, count, inject
from qlora.adapters.lora import Lora
from qlora.adapters.modules_to_save import add_modules_to_save
from qlora.adapters.trainable_tokens import token_ids, train_token_rows
from qlora.model.load_base import Base
from qlora.recipe.recipe import Recipe


def build_adapter(recipe: Recipe, model: nn.Module) -> Lora | Full:
    """The adapter kind of the recipe, for a model with experts or without. AdapterError as `resolve_expert_rank`."""
    section = recipe.adapter
    if section.kind == "full":
        return Full()
    patterns = (dict(section.rank_pattern or {}), dict(section.alpha_pattern or {}))
    expert_rank = resolve_expert_rank(section.expert_rank, section.rank, model)
    return ADAPTERS[section.kind](section.rank, section.alpha, section.dropout, *patterns, expert_rank)  # type: ignore[no-any-return]


def add_adapter(recipe: Recipe, adapter: Lora | Full, base: Base) -> Injection:
    """Add what the recipe trains: low-rank updates, modules to save, trainable tokens; or every weight."""
    model, section = base.model, recipe.adapter
    if isinstance(adapter, Full):
        return adapter.train_all(model)
    injection = inject(model, adapter, target_modules(recipe), recipe.train.seed)
    refuse_unused_rank(section.expert_rank, injection.expert_stacks)
    full_modules = add_modules_to_save(model, section.save_modules)
    if section.tokens or section.new_tokens:
        rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        full_modules += train_token_rows(model, token_ids(base.tokenizer, (*section.tokens, *section.new_tokens), rows))
    return (
        replace(count(model, injection.linear_layers), trained_modules=tuple(full_modules))
        if full_modules
        else injection
    )


def target_modules(recipe: Recipe) -> str | Sequence[str]:
    """Which layers are adapted: `all-linear` unless the recipe names others."""
    return recipe.adapter.targets or "all-linear"
