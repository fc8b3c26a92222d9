"""The recipe of a model that was not trained: the default settings, without training data."""

from collections.abc import Sequence

from qlora.recipe.recipe import Recipe, from_mapping

NO_DATA = "-"  # `data.train` of a model without a recipe


def default_recipe(model: str, overrides: Sequence[str] = ()) -> Recipe:
    """The default settings for a model, without training data."""
    return from_mapping({"model": model, "data": {"train": NO_DATA}}, "defaults", overrides)[0]


def has_data(recipe: Recipe) -> bool:
    """Whether the recipe names training data; the default one of a model names none."""
    return recipe.data.train[0].path != NO_DATA
