"""Finished runs of tiny models to export, each trained once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.small_runs import recipe_of, run, write_records


class Runs:
    """A finished run for a family and overrides, whose adapter is far enough from zero to change the logits."""

    def __init__(self, zoo: Callable[..., Path], folder: Path) -> None:
        self.zoo, self.folder = zoo, folder
        self.data = write_records(folder / "records.jsonl", 12)

    def train(self, family: str, *overrides: str, **options: Any) -> Path:
        output = self.folder / "-".join([family, *(text.replace("=", "") for text in overrides), *map(str, options)])
        if not output.exists():
            settings = ("data.eval_fraction=0.25", "train.max_steps=2", "optim.learning_rate=0.02", *overrides)
            run(recipe_of(self.zoo(family, **options), self.data, output, *settings))
        return output


@pytest.fixture(scope="session")
def runs(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(zoo, tmp_path_factory.mktemp("export"))
