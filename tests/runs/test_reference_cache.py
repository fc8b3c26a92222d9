"""The reference's log-probabilities beside the prepared data: computed once, read again, never of something else."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.preferences import write_pairs
from support.small_runs import differing_tensors, metrics, recipe_of, run

from qlora.adapters.adapter_folder import WEIGHTS
from qlora.recipe.recipe import Recipe
from qlora.runs.reference_cache import SUFFIX, fingerprint, read_values, write_values
from qlora.runs.resources import unplanned
from qlora.runs.setup import set_up
from qlora.runs.write_artifacts import RunSetup
from qlora.training.run_log import Log

Zoo = Callable[..., Path]
PAIRS = 8
IDENTITY = {"base": "a", "reference": "base", "rows": ["train", "b"]}


def recipe_for(model: Path, folder: Path, output: str, *overrides: str) -> Recipe:
    options = ("objective.kind=dpo", "data.eval_fraction=0.25", "optim.learning_rate=1e-3")
    options += ("train.global_batch=6", "train.micro_batch=6")  # one step an epoch
    return recipe_of(model, folder / "pairs.jsonl", folder / output, *options, *overrides)


def kept(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((cache / "data").glob(f"*{SUFFIX}"))}


def test_values_are_computed_once_and_read_by_the_next_run(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    run(recipe_for(zoo("llama"), tmp_path, "once", "train.max_steps=1"))
    assert len(kept(tmp_path / "cache")) == 1  # of the held-out pairs only
    run(recipe_for(zoo("llama"), tmp_path, "first", "train.max_steps=2"))
    files = kept(tmp_path / "cache")
    assert len(files) == 2
    first, once = metrics(tmp_path / "first"), metrics(tmp_path / "once")
    assert first[0]["loss"] == pytest.approx(once[0]["loss"], rel=1e-6) and first[0]["loss"] != first[1]["loss"]
    run(recipe_for(zoo("llama"), tmp_path, "second", "train.max_steps=2"))
    assert kept(tmp_path / "cache") == files
    assert differing_tensors(tmp_path / "first", tmp_path / "second") == []
    name, content = next(iter(files.items()))
    (tmp_path / "cache" / "data" / name).write_bytes(content[:-1])
    run(recipe_for(zoo("llama"), tmp_path, "third", "train.max_steps=2", "objective.beta=0.2"))
    assert kept(tmp_path / "cache") == files  # computed again; another beta reads the same ones
    run(recipe_for(zoo("llama"), tmp_path, "fourth", "train.max_steps=2", "quant.kind=fp4"))
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


def test_the_fingerprint_has_all_that_values_depend_on(zoo: Zoo, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / WEIGHTS).write_bytes(b"weights")
    recipe = recipe_for(zoo("llama"), tmp_path, "run")
    setup = set_up(recipe, unplanned(recipe), Log(tmp_path / "run", quiet=True))

    def differing(changed: RunSetup, before: RunSetup = setup) -> set[str]:
        own, other = (fingerprint(run, "train") for run in (before, changed))
        return {key for key in own if own[key] != other[key]}

    def with_settings(*overrides: str) -> RunSetup:
        return replace(setup, recipe=recipe_for(zoo("llama"), tmp_path, "run", *overrides))

    def with_manifest(**values: Any) -> RunSetup:
        return replace(setup, base=replace(setup.base, manifest=replace(setup.base.manifest, **values)))

    assert differing(with_manifest(sha256="0")) == differing(with_manifest(dtype="bfloat16")) == {"base"}
    assert differing(replace(setup, encoder=replace(setup.encoder, sha256="0"))) == {"template"}
    for override, keys in (
        ("quant.kind=fp4", {"base"}),
        (f"objective.reference={tmp_path / 'adapter'}", {"reference"}),
        ("train.seed=7", {"rows"}),
        ("data.max_length=99", {"rows"}),
        ("model.attention=sdpa", {"computed"}),
        ("objective.beta=0.3", set[str]()),
        ("optim.learning_rate=1e-4", set[str]()),
    ):
        assert differing(with_settings(override)) == keys, override
    kto = with_settings("objective.kind=kto", "train.global_batch=4")
    assert differing(with_settings("objective.kind=kto", "train.global_batch=2"), kto) == {"examples"}
