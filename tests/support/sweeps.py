"""Whole sweeps of a tiny model, and what the same runs leave alone: what the tests of sweeping share."""

import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.recipe.recipe import dump
from qlora.runs.sweep import variant_run as runners
from qlora.runs.sweep.result import Outcome
from qlora.runs.sweep.train_together import train_together
from qlora.runs.sweep.variants import Variant, variants_of
from qlora.training import loop
from support.small_runs import differing, metrics, recipe_of, run, write_rows

Zoo = Callable[..., Path]
ROWS = 10  # global batch 4: three steps an epoch, the last one short


class Sweep:
    """A recipe on disk with a folder for its sweep, and one for the same runs alone."""

    def __init__(self, model: Path, folder: Path, *overrides: str) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.data = write_rows(folder / "rows.jsonl", ROWS)
        self.path = folder / "recipe.yaml"
        self.path.write_text(dump(recipe_of(model, self.data, folder / "together", *overrides)))

    def variants(self, *arguments: str, file: Mapping[str, Any] | None = None, out: str = "together") -> list[Variant]:
        named = None
        if file is not None:
            (self.folder / "variants.yaml").write_text(json.dumps(file))
            named = str(self.folder / "variants.yaml")
        return variants_of(str(self.path), arguments, named, str(self.folder / out))

    def together(self, *arguments: str, file: Mapping[str, Any] | None = None) -> Outcome:
        return train_together(self.variants(*arguments, file=file), self.folder / "together", quiet=True)

    def alone(self, *arguments: str, file: Mapping[str, Any] | None = None) -> list[str]:
        """Every variant as a run of its own; their names."""
        variants = self.variants(*arguments, file=file, out="alone")
        for variant in variants:
            run(variant.recipe)
        return [variant.name for variant in variants]

    def same(self, names: Sequence[str]) -> None:
        """What the sweep left is what the runs alone left: files, adapters, losses, results."""
        for name in names:
            ours, theirs = self.folder / "together" / name, self.folder / "alone" / name
            assert differing(ours, theirs) == [], name
            for event in ("train", "eval"):
                assert metrics(ours, event) == metrics(theirs, event), name
            results = [json.loads((folder / "run.json").read_text()) for folder in (ours, theirs)]
            assert results[0].keys() == results[1].keys()
            for part in ("result", "adapter", "base", "data", "samples"):
                assert results[0][part] == results[1][part], (name, part)
            text = (theirs / "recipe.yaml").read_text().replace(str(theirs), str(ours))
            assert (ours / "recipe.yaml").read_text() == text
            files = [sorted(str(path.relative_to(at)) for path in at.rglob("*")) for at in (ours, theirs)]
            assert files[0] == files[1], name
            for folder in ours.glob("checkpoint-*"):
                assert (folder / "optimizer.safetensors").read_bytes() == (
                    theirs / folder.name / "optimizer.safetensors"
                ).read_bytes()


class poisoned:
    """Inside the block one variant's gradient is not a number in the steps named (counted from 1)."""

    def __init__(self, name: str, steps: Sequence[int]) -> None:
        self.name, self.steps, self.patch, self.calls = name, steps, pytest.MonkeyPatch(), 0

    def __enter__(self) -> None:
        assemble = runners.assemble

        def assembled(parts: Any, *rest: Any) -> Any:
            job = assemble(parts, *rest)
            if Path(parts.recipe.train.output).name == self.name:
                list(job.trainable.values())[3].register_hook(self.spoil)
            return job

        self.patch.setattr(runners, "assemble", assembled)

    def spoil(self, gradient: torch.Tensor) -> torch.Tensor:
        self.calls += 1  # one micro-batch a step
        return gradient * float("nan") if self.calls in self.steps else gradient

    def __exit__(self, *error: object) -> None:
        self.patch.undo()


class signalled:
    """Inside the block the process sends itself a signal in the middle of one of all steps (counted from 1)."""

    def __init__(self, at: int, number: int = signal.SIGTERM) -> None:
        self.at, self.number, self.patch, self.steps = at, number, pytest.MonkeyPatch(), 0

    def __enter__(self) -> None:
        taken = loop._step

        def step(job: Any, number: int) -> Any:
            self.steps += 1
            if self.steps == self.at:
                os.kill(os.getpid(), self.number)
            return taken(job, number)

        self.patch.setattr(loop, "_step", step)

    def __exit__(self, *error: object) -> None:
        self.patch.undo()
