"""A minimal recipe, and the problems that reading a recipe reports."""

from collections.abc import Callable
from typing import Any

import pytest

from qlora.errors import RecipeError

MINIMAL = "model: m\ndata: {train: rows.jsonl}\n"


def problems_of(read: Callable[..., Any], *arguments: Any) -> list[str]:
    """The lines of the RecipeError that `read(*arguments)` raises."""
    with pytest.raises(RecipeError) as raised:
        read(*arguments)
    return str(raised.value).splitlines()
