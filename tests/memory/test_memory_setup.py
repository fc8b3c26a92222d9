"""Streaming, offloading and recomputing change no result, from training to the exported model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_runs import differing_tensors, metrics, recipe_of, run, write_records

from qlora.errors import RecipeError
from qlora.exporters import ExportRequest
from qlora.exporters.export_run import export_run
from qlora.memory.planner.search import UserChoices
from qlora.model.linear_layers import frozen_linears
from qlora.model.safetensors_reader import SafetensorsReader
from qlora.recipe.planning import user_choices
from qlora.runs.evaluate import evaluate_run
from qlora.runs.generate import generate_from_prompts
from qlora.runs.load_run import load_run
from qlora.runs.memory_setup import load_base
from qlora.runs.prompts import read_prompts

Zoo = Callable[..., Path]
POLICIES = {
    "stream": ("memory.weights=stream", "memory.recompute=none"),
    "offload": ("memory.offload_activations=true", "memory.recompute=1"),
    "all": ("memory.weights=stream", "memory.offload_activations=true", "memory.recompute=all"),
}
PLAIN = ("memory.weights=resident", "memory.recompute=none", "memory.offload_activations=false")
SETTINGS = ("data.eval_fraction=0.25", "train.max_steps=2", "adapter.dropout=0.1", "optim.learning_rate=0.02")


@pytest.fixture(scope="module")
def plain(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(zoo("llama"), tmp_path_factory.mktemp("plain"), PLAIN)


def trained(model: Path, folder: Path, policy: tuple[str, ...]) -> Path:
    run(recipe_of(model, write_records(folder / "rows.jsonl", 12), folder / "run", *SETTINGS, *policy))
    return folder / "run"


@pytest.mark.sample(of=3)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_the_same_run(zoo: Zoo, plain: Path, tmp_path: Path, policy: str) -> None:
    other = trained(zoo("llama"), tmp_path, POLICIES[policy])
    assert differing_tensors(plain, other) == []
    for event in ("train", "eval"):
        assert metrics(plain, event) == metrics(other, event)


def test_a_streamed_run_evaluates_and_exports_as_a_resident_one(zoo: Zoo, plain: Path, tmp_path: Path) -> None:
    streamed = load_run(str(trained(zoo("llama"), tmp_path, POLICIES["stream"])))
    resident = load_run(str(plain))
    assert streamed.base.manifest == resident.base.manifest
    assert any(layer.fetch for layer in frozen_linears(streamed.base.model).values())
    assert evaluate_run(streamed, None, "loss") == evaluate_run(resident, None, "loss")
    prompts = read_prompts("red green")
    assert generate_from_prompts(streamed, prompts, 8, 0.0) == generate_from_prompts(resident, prompts, 8, 0.0)
    request = ExportRequest(to="merged", dtype="float32")
    folders = [tmp_path / name for name in ("streamed", "resident")]
    exports = [export_run(run, request, str(folder)) for run, folder in zip((streamed, resident), folders, strict=True)]
    assert exports[0]["agreement"] == exports[1]["agreement"]
    one, other = (SafetensorsReader(folder) for folder in folders)
    assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


def test_a_model_without_a_plan_streams_by_its_recipe(zoo: Zoo, tmp_path: Path) -> None:
    recipe = recipe_of(zoo("llama"), write_records(tmp_path / "rows.jsonl", 4), tmp_path / "run", *POLICIES["stream"])
    base = load_base(recipe, torch.device("cpu"), None)
    assert all(layer.fetch for layer in frozen_linears(base.model).values())


@pytest.mark.parametrize("key, value", [("weights", "stream"), ("offload_activations", True)])
def test_compiled_layers_neither_stream_nor_offload(zoo: Zoo, tmp_path: Path, key: str, value: Any) -> None:
    sections: dict[str, Any] = {"train": {"compile": True}, "memory": {key: value}}
    with pytest.raises(RecipeError, match=rf"memory\.{key}.*train\.compile"):
        recipe_of(zoo("llama"), tmp_path / "rows.jsonl", tmp_path / "run", **sections)
    recipe = recipe_of(zoo("llama"), tmp_path / "rows.jsonl", tmp_path / "run", "train.compile=true")
    assert user_choices(recipe, 2) == UserChoices(recompute=None, offload=False, weights="resident")
