"""How the base is stored when a run or a model is opened: as its recipe has it, as exported, or as `--quant` says."""

from collections.abc import Callable
from pathlib import Path

from qlora.errors import InputError, did_you_mean
from qlora.model.model_folder import is_export
from qlora.quant import QUANTIZERS
from qlora.recipe.default_recipe import default_recipe
from qlora.recipe.recipe import Recipe

DENSE = "dense"
Log = Callable[[str], None]


def stored_as(recipe: Recipe, quant: str | None, name: str, is_model: bool, log: Log) -> Recipe:
    """The recipe with `quant` as its quant.kind. None: no change, but an exported model keeps its dtype.

    is_model: `name` is a model without a run. InputError for an unknown kind, or a model of which every weight trained.
    """
    usual = recipe.quant.kind
    if quant is None:
        if not (is_model and is_export(Path(name).expanduser())):
            return recipe
        log(f"{name}: an exported model, which runs in the dtype of its files; --quant {usual} quantizes it")
        return _with_kind(recipe, DENSE)
    if quant not in QUANTIZERS:
        raise InputError(f"--quant: no {quant!r}.{did_you_mean(quant, QUANTIZERS)}")
    if recipe.adapter.kind == "full" and quant != usual:
        raise InputError(
            f"--quant: found {quant}, allowed: {DENSE}. Every weight of {name} was trained, none is frozen."
        )
    if quant != usual:
        log(f"{name}: the base is stored as {quant}, not as {usual} ({'the default' if is_model else 'in its recipe'})")
    return _with_kind(recipe, quant)


def _with_kind(recipe: Recipe, kind: str) -> Recipe:
    """The recipe with the default settings of another kind of storage."""
    if recipe.quant.kind == kind:
        return recipe
    quant = default_recipe(recipe.model.name, (f"quant.kind={kind}",)).quant
    return recipe.model_copy(update={"quant": quant})
