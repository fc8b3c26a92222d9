"""A finished run, trained once from the command line, for tests of what it leaves and of what reads it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.command_line import qlora
from support.small_runs import write_records

RECIPE = """\
model: {{name: {model}, dtype: float32}}
adapter: {{rank: 4}}
data: {{train: {data}, eval_fraction: 0.25, max_length: 200}}
optim: {{kind: adamw, learning_rate: 5e-3}}
train: {{output: {output}, max_steps: 4, global_batch: 4, save_every: 2}}
"""


class FinishedRun:
    """A run in `folder/run`, the output of the command, and the model, data and recipe it was made from."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder, self.run = model, folder, folder / "run"
        self.data = write_records(folder / "rows.jsonl", 16)
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(RECIPE.format(model=model, data=self.data, output=self.run))
        self.result = qlora("train", self.recipe, "train.epochs=null", "--adapter.alpha", "8", "--optim.warmup=1")

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The content of run.json."""
        return json.loads((self.run / "run.json").read_text())  # type: ignore[no-any-return]
