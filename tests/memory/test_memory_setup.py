"""A run that streams, parks and recomputes is the run that does none of it, from training to the exported model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_runs import differing, metrics, recipe_of, run, write_rows

from qlora.adapters.inject import frozen_linears
from qlora.errors import RecipeError
from qlora.exporters.export_run import ExportRequest, export_run
from qlora.memory.planner.search import UserChoices
from qlora.model.safetensors_reader import Shards
from qlora.recipe.planning import left_open
from qlora.runs.evaluate_and_generate import answer_prompts, measure
from qlora.runs.load_run import load_run
from qlora.runs.memory_setup import load_base

Zoo = Callable[..., Path]
WAYS = {
    "stream": ("memory.weights=stream", "memory.recompute=none"),
    "park": ("memory.offload_activations=true", "memory.recompute=1"),
    "all": ("memory.weights=stream", "memory.offload_activations=true", "memory.recompute=all"),
}
PLAIN = ("memory.weights=resident", "memory.recompute=none", "memory.offload_activations=false")
SHOWN = ("data.eval_fraction=0.25", "train.max_steps=3", "adapter.dropout=0.1", "optim.learning_rate=0.02")


@pytest.fixture(scope="module")
def plain(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(zoo("llama"), tmp_path_factory.mktemp("plain"), PLAIN)


def trained(model: Path, folder: Path, way: tuple[str, ...]) -> Path:
    run(recipe_of(model, write_rows(folder / "rows.jsonl", 12), folder / "run", *SHOWN, *way))
    return folder / "run"


@pytest.mark.parametrize("way", WAYS)
def test_however_it_runs_it_is_the_same_run(zoo: Zoo, plain: Path, tmp_path: Path, way: str) -> None:
    other = trained(zoo("llama"), tmp_path, WAYS[way])
    assert differing(plain, other) == []
    for event in ("train", "eval"):
        assert metrics(plain, event) == metrics(other, event)


def test_a_finished_run_answers_and_exports_alike(zoo: Zoo, plain: Path, tmp_path: Path) -> None:
    streamed = load_run(str(trained(zoo("llama"), tmp_path, WAYS["stream"])))
    resident = load_run(str(plain))
    assert streamed.base.manifest == resident.base.manifest
    assert any(layer.fetch for layer in frozen_linears(streamed.base.model).values())
    assert measure(streamed, None, "loss") == measure(resident, None, "loss")
    assert answer_prompts(streamed, "red green", 8, 0.0) == answer_prompts(resident, "red green", 8, 0.0)
    order = ExportRequest(to="merged", onto="dequantized", dtype="float32", data=None, rows=None)
    written = [tmp_path / name for name in ("streamed", "resident")]
    answers = [export_run(opened, order, str(at)) for opened, at in zip((streamed, resident), written, strict=True)]
    assert answers[0]["agreement"] == answers[1]["agreement"]
    ours, theirs = (Shards(folder) for folder in written)
    assert set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_unplanned_model_streams_when_told(zoo: Zoo, tmp_path: Path) -> None:
    recipe = recipe_of(zoo("llama"), write_rows(tmp_path / "rows.jsonl", 4), tmp_path / "run", *WAYS["stream"])
    base = load_base(recipe, torch.device("cpu"), None)
    assert all(layer.fetch for layer in frozen_linears(base.model).values())


@pytest.mark.parametrize("key, value", [("weights", "stream"), ("offload_activations", True)])
def test_compiled_layers_neither_stream_nor_park(zoo: Zoo, tmp_path: Path, key: str, value: Any) -> None:
    sections: dict[str, Any] = {"train": {"compile": True}, "memory": {key: value}}
    with pytest.raises(RecipeError, match=rf"memory\.{key}.*train\.compile"):
        recipe_of(zoo("llama"), tmp_path / "rows.jsonl", tmp_path / "run", **sections)
    recipe = recipe_of(zoo("llama"), tmp_path / "rows.jsonl", tmp_path / "run", "train.compile=true")
    assert left_open(recipe, 2) == UserChoices(recompute=None, offload=False, weights="resident")
