"""Fixtures for the tests of recipes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.recipe.recipe import Recipe, read


@pytest.fixture
def read_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Recipe, list[str]]]:
    """Reads a text with overrides; the file is called recipe.yaml."""
    monkeypatch.chdir(tmp_path)

    def read_text(text: str, *overrides: str) -> tuple[Recipe, list[str]]:
        (tmp_path / "recipe.yaml").write_text(text)
        return read("recipe.yaml", overrides)

    return read_text
