"""The reference's log-probabilities beside the prepared data: computed once, read again, never of something else."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.preferences import write_pairs
from support.small_runs import differing_tensors, metrics, recipe_of, run

from qlora.recipe.recipe import Recipe
from qlora.runs.reference_cache import SUFFIX, read_values, write_values

Zoo = Callable[..., Path]
PAIRS = 8
IDENTITY = {"base": "a", "reference": "base", "rows": ["train", "b"]}


def recipe_for(model: Path, folder: Path, output: str, *overrides: str) -> Recipe:
    options = ("objective.kind=dpo", "train.global_batch=4", "data.eval_fraction=0.25", "optim.learning_rate=1e-3")
    return recipe_of(model, folder / "pairs.jsonl", folder / output, *options, *overrides)


def kept(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((cache / "data").glob(f"*{SUFFIX}"))}


def test_values_are_computed_once_and_read_by_the_next_run(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    run(recipe_for(zoo("llama"), tmp_path, "once", "train.max_steps=2"))
    assert len(kept(tmp_path / "cache")) == 1  # of the held-out pairs only
    run(recipe_for(zoo("llama"), tmp_path, "first", "train.max_steps=3"))
    files = kept(tmp_path / "cache")
    assert len(files) == 2
    first, once = metrics(tmp_path / "first"), metrics(tmp_path / "once")
    assert first[0]["loss"] == pytest.approx(once[0]["loss"], rel=1e-6) and first[0]["loss"] != first[1]["loss"]
    run(recipe_for(zoo("llama"), tmp_path, "second", "train.max_steps=3"))
    assert kept(tmp_path / "cache") == files
    assert differing_tensors(tmp_path / "first", tmp_path / "second") == []
    name, content = next(iter(files.items()))
    (tmp_path / "cache" / "data" / name).write_bytes(content[:-1])
    run(recipe_for(zoo("llama"), tmp_path, "third", "train.max_steps=3", "objective.beta=0.2"))
    assert kept(tmp_path / "cache") == files  # computed again; another beta reads the same ones
    run(recipe_for(zoo("llama"), tmp_path, "fourth", "train.max_steps=3", "quant.kind=fp4"))
    assert len(kept(tmp_path / "cache")) == 4  # another base has others


def test_a_file_of_something_else_is_not_used(tmp_path: Path) -> None:
    path, values = tmp_path / "values", np.array([-1.5, -2.5], np.float32)
    assert read_values(path, IDENTITY) == (None, "")
    assert "kept in" in write_values(path, IDENTITY, values)
    actual, problem = read_values(path, IDENTITY)
    assert actual is not None and actual.tolist() == [-1.5, -2.5] and not problem
    other = read_values(path, {**IDENTITY, "base": "c", "reference": "d"})
    assert other == (None, "computed for another base and reference")
    for content in (b"", b"{}\n", path.read_bytes() + b"\0"):
        path.write_bytes(content)
        assert read_values(path, IDENTITY) == (None, "damaged")
