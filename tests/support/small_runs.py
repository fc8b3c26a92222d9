"""Small runs for the tests: rows on disk, a recipe around a tiny model, and a whole training run in this process."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.adapters import peft_files
from qlora.recipe.recipe import Recipe, from_mapping
from qlora.runs.train import train
from qlora.training.run_log import read_metrics

WORDS = ("red", "green", "blue", "one", "two", "three", "cat", "dog", "sun", "moon")


def write_rows(path: Path, count: int, seed: int = 0, longest: int = 6) -> Path:
    """Conversations of different lengths, one a line."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            asked, answer = ([draw.choice(WORDS) for _ in range(draw.randint(1, longest))] for _ in "ab")
            turns = [
                {"role": "user", "content": f"{number} {' '.join(asked)}"},
                {"role": "assistant", "content": " ".join(answer)},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def recipe_of(model: Path, data: Path, output: Path, *overrides: str, **sections: Mapping[str, Any]) -> Recipe:
    """A short run of a tiny model: 6 steps of 4 rows, rank 4, everything else by default; the last override counts."""
    mapping: dict[str, Any] = {
        "model": {"name": str(model), "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": str(data), "eval_fraction": 0.0, "max_length": 96, "packing": False},
        "optim": {"kind": "adamw", "learning_rate": 5e-3},
        "train": {"output": str(output), "max_steps": 6, "micro_batch": 2, "global_batch": 4},
    }
    for name, section in sections.items():
        mapping[name] = mapping.get(name, {}) | dict(section)
    last = {override.partition("=")[0]: override for override in overrides}
    return from_mapping(mapping, overrides=[*last.values()])[0]


def run(recipe: Recipe) -> Mapping[str, Any]:
    """`qlora train` in this process, silent."""
    return train(recipe, quiet=True)


def adapter_tensors(folder: Path | str) -> dict[str, Tensor]:
    """The adapter of a run or a checkpoint."""
    return peft_files.read_named(Path(folder) / peft_files.WEIGHTS)


def differing(one: Path | str, other: Path | str) -> list[str]:
    """Names of the adapter tensors that are not the same bit for bit in two folders."""
    ours, theirs = adapter_tensors(one), adapter_tensors(other)
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def metrics(folder: Path | str, event: str = "train") -> list[dict[str, Any]]:
    """Lines of one kind out of metrics.jsonl, what a clock or a memory meter said left out."""
    timed = ("tokens_per_second", "peak_bytes")
    lines = [line for line in read_metrics(Path(folder)) if line["event"] == event]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]
