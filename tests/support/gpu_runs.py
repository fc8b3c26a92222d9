"""Runs of tiny models on the pretended GPU: each is trained once, and must cause no violation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora.memory.planner.memory_plan import Plan
from qlora.recipe.planning import Machine, Planner
from qlora.recipe.recipe import Recipe
from support.pretended_gpu import Counters, PretendedGpu, pretended_gpu
from support.small_runs import recipe_of, run, write_records
from support.tiny_models import FAMILIES, byte_tokenizer

SETTINGS = ("train.max_steps=1", "train.micro_batch=4", "data.max_length=96", "data.packing=true")
GIB = 2**30


@dataclass(frozen=True)
class GpuRun:
    """A finished run: its folder and what it did on the GPU."""

    folder: Path
    counters: Counters
    recipe: Recipe


class GpuRuns:
    """Models, records and finished runs in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records = write_records(folder / "records.jsonl", 24)
        self._runs: dict[tuple[str, ...], GpuRun] = {}

    def model(self, family: str = "llama", layers: int = 2) -> Path:
        """The folder of a random model, saved at its first use."""
        folder = self.folder / f"{family}-{layers}"
        if not folder.exists():
            config = FAMILIES[family]().to_dict() | {"num_hidden_layers": layers}
            config.pop("layer_types", None)  # depends on the number of layers
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
            model.save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
        return folder

    def recipe(self, name: str, *overrides: str, family: str = "llama", layers: int = 2) -> Recipe:
        """A recipe of one step, whose run folder is called `name`."""
        return recipe_of(self.model(family, layers), self.records, self.folder / name, *SETTINGS, *overrides)

    def train(self, *overrides: str, family: str = "llama", layers: int = 2, **options: Any) -> GpuRun:
        """The run of these settings, trained at its first use without a violation."""
        key = (*overrides, family, str(layers), *map(str, options.values()))
        if key not in self._runs:
            self._runs[key] = self.train_anew(*overrides, family=family, layers=layers, **options)
        return self._runs[key]

    def train_anew(self, *overrides: str, family: str = "llama", layers: int = 2, **options: Any) -> GpuRun:
        """The same, in a folder of its own."""
        recipe = self.recipe(f"run-{len(list(self.folder.iterdir()))}", *overrides, family=family, layers=layers)
        with checked_gpu(**options) as gpu:
            run(recipe)
        return GpuRun(Path(recipe.train.output), gpu.counters, recipe)


@contextmanager
def checked_gpu(**options: Any) -> Iterator[PretendedGpu]:
    """A pretended GPU on which nothing may go wrong."""
    with pretended_gpu(**options) as gpu:
        yield gpu
    assert gpu.counters.violations == {}
    assert gpu.pinned.errors == []
    assert [event for event in gpu.counters.copies if "pageable, copy stream" in event.what] == []


def smallest_gpu(recipe: Recipe, accepts: Callable[[Plan], bool] = lambda plan: True) -> int:
    """The free bytes of the smallest GPU that a recipe fits, and whose plan a test accepts."""
    planner, low, high = Planner(recipe), 0, 4 * GIB
    while high - low > 256:
        middle = (low + high) // 2
        plan = planner.plan(Machine(middle))
        low, high = (low, middle) if plan.fits and accepts(plan) else (middle, high)
    return high
