"""Sweeps of a tiny model, and the same runs alone: helpers for the tests of sweeps."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qlora.recipe.recipe import dump
from qlora.runs.sweep.result import SweepResult
from qlora.runs.sweep.train_together import train_together
from qlora.runs.sweep.variants import Variant, variants_of
from qlora.training.loss import TokenLoss
from support.small_runs import differing_tensors, metrics, recipe_of, run, write_records
from support.training_hooks import before_first_forward, trainable

Zoo = Callable[..., Path]
RECORDS = 10  # global batch 4: three steps an epoch, the last one short


class Sweep:
    """A recipe on disk, with a folder for its sweep and one for the same runs alone."""

    def __init__(self, model: Path, folder: Path, *overrides: str, data: Path | None = None) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.data = data or write_records(folder / "records.jsonl", RECORDS)
        self.path = folder / "recipe.yaml"
        self.path.write_text(dump(recipe_of(model, self.data, folder / "together", *overrides)))

    def variants(self, *arguments: str, file: Mapping[str, Any] | None = None, out: str = "together") -> list[Variant]:
        path = None
        if file is not None:
            (self.folder / "variants.yaml").write_text(json.dumps(file))
            path = str(self.folder / "variants.yaml")
        return variants_of(str(self.path), arguments, path, str(self.folder / out))

    def train_together(self, *arguments: str, file: Mapping[str, Any] | None = None) -> SweepResult:
        return train_together(self.variants(*arguments, file=file), self.folder / "together", quiet=True)

    def train_alone(
        self, *arguments: str, file: Mapping[str, Any] | None = None, names: Sequence[str] = ()
    ) -> list[str]:
        """Train every variant, or those of `names`, as a separate run; returns their names."""
        variants = self.variants(*arguments, file=file, out="alone")
        variants = [variant for variant in variants if not names or variant.name in names]
        for variant in variants:
            run(variant.recipe)
        return [variant.name for variant in variants]

    def assert_same_runs(self, names: Sequence[str]) -> None:
        """The run folders of the sweep are those of the separate runs: files, adapters, losses, results."""
        for name in names:
            together, alone = self.folder / "together" / name, self.folder / "alone" / name
            assert differing_tensors(together, alone) == [], name
            for event in ("train", "eval"):
                assert metrics(together, event) == metrics(alone, event), name
            manifests = [json.loads((folder / "run.json").read_text()) for folder in (together, alone)]
            assert manifests[0].keys() == manifests[1].keys()
            for key in ("result", "adapter", "base", "data", "samples"):
                assert manifests[0][key] == manifests[1][key], (name, key)
            text = (alone / "recipe.yaml").read_text().replace(str(alone), str(together))
            assert (together / "recipe.yaml").read_text() == text
            files = [
                sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (together, alone)
            ]
            assert files[0] == files[1], name
            for folder in together.glob("checkpoint-*"):
                assert (folder / "optimizer.safetensors").read_bytes() == (
                    alone / folder.name / "optimizer.safetensors"
                ).read_bytes()


@contextmanager
def nan_gradient(name: str, steps: Sequence[int]) -> Iterator[None]:
    """Inside the block the gradient of one tensor of the variant `rank-N` is NaN in some steps (counted from 1)."""
    rank, calls = int(name.removeprefix("rank-")), 0

    def replace(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1  # one micro-batch a step
        return gradient * float("nan") if calls in steps else gradient

    def register(model: TokenLoss) -> None:
        parameter = list(trainable(model).values())[3]
        if min(parameter.shape) == rank:
            parameter.register_hook(replace)

    with before_first_forward(register):
        yield
