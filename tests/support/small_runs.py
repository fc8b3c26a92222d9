"""Small runs: records on disk, a recipe for a tiny model, a training run in this process, its adapter and metrics."""

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


def write_records(path: Path, count: int, seed: int = 0, max_words: int = 6) -> Path:
    """Conversations of different lengths, one per line."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            question, answer = ([draw.choice(WORDS) for _ in range(draw.randint(1, max_words))] for _ in "ab")
            messages = [
                {"role": "user", "content": f"{number} {' '.join(question)}"},
                {"role": "assistant", "content": " ".join(answer)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def recipe_of(model: Path, data: Path, output: Path, *overrides: str, **sections: Mapping[str, Any]) -> Recipe:
    """A short run of a tiny model: 6 steps of one micro-batch of 4 sequences, rank 4.

    The last override of a key counts.
    """
    mapping: dict[str, Any] = {
        "model": {"name": str(model), "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": str(data), "eval_fraction": 0.0, "max_length": 96, "packing": False},
        "optim": {"kind": "adamw", "learning_rate": 5e-3},
        "train": {"output": str(output), "max_steps": 6, "micro_batch": 4, "global_batch": 4},
    }
    for name, section in sections.items():
        mapping[name] = mapping.get(name, {}) | dict(section)
    last = {override.partition("=")[0]: override for override in overrides}
    return from_mapping(mapping, overrides=[*last.values()])[0]


def run(recipe: Recipe) -> Mapping[str, Any]:
    """`qlora train` in this process, without output."""
    return train(recipe, quiet=True)


def adapter_tensors(folder: Path | str) -> dict[str, Tensor]:
    """The adapter tensors of a run or a checkpoint."""
    return peft_files.read_tensors(Path(folder) / peft_files.WEIGHTS)


def differing_tensors(first: Path | str, second: Path | str) -> list[str]:
    """Names of the adapter tensors that differ in any bit between two folders."""
    first_tensors, second_tensors = adapter_tensors(first), adapter_tensors(second)
    assert first_tensors.keys() == second_tensors.keys()
    return [name for name in first_tensors if not torch.equal(first_tensors[name], second_tensors[name])]


def metrics(folder: Path | str, event: str = "train") -> list[dict[str, Any]]:
    """Lines of one event in metrics.jsonl, without measured times and memory."""
    measured = ("tokens_per_second", "peak_bytes")
    lines = [line for line in read_metrics(Path(folder)) if line["event"] == event]
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]
