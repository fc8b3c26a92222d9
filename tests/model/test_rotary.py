"""LongRoPE and dynamic scaling: each document has the frequencies of its own length, and no frozen byte changes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.architectures import save_architecture
from support.small_runs import adapter_tensors, metrics, recipe_of, run
from transformers import AutoModelForCausalLM

from qlora.data.batching.collate import collate
from qlora.data.batching.join import join_documents
from qlora.data.types import Example
from qlora.model import Model
from qlora.model.frozen_digest import frozen_sha256
from qlora.model.lm_head import Head
from qlora.model.load_base import load
from qlora.model.rotary import DocumentRotary, describe_lengths, lengths_from_positions, lengths_from_starts
from qlora.quant.dense import Dense
from qlora.recipe.check import check_contents

ORIGINAL = 64  # tokens of the original context
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0] * 8, "long_factor": [2.0 + 0.5 * index for index in range(8)], "factor": 4.0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
GEMMA = {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL}),
    "longrope in some layers": (
        "gemma3_text",
        {"rope_parameters": GEMMA, "sliding_window": 32, "layer_types": list(GEMMA)},
    ),
}
LENGTHS = (40, 50, 150, 64, 65, 100)
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            kind, settings = MODELS[name]
            folders[name] = save_architecture(tmp_path_factory.mktemp(kind), kind, 10**6, settings)
        return folders[name]

    return folder


def examples(lengths: Sequence[int] = LENGTHS) -> list[Example]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(40, 250, length).astype(np.int32) for length in lengths]
    return [Example(f"rows:{number}", values, values) for number, values in enumerate(ids)]


def loaded(folder: Path) -> Any:
    return load(Model(name=str(folder), dtype="float32"), Dense(), torch.device("cpu")).model


@torch.no_grad()
def logits_alone(folder: Path, example: Example) -> torch.Tensor:
    """What transformers gives one document, in a model that has seen no other."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(input_ids=torch.from_numpy(example.input_ids.astype(np.int64))[None]).logits[0]  # type: ignore[no-any-return]


@pytest.mark.sample(of=3)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_documents_have_the_frequencies_of_their_own_length(folder_of: Folders, name: str) -> None:
    folder, documents = folder_of(name), examples()
    model = loaded(folder)
    assert describe_lengths(model, max(LENGTHS))  # the configuration means what it says
    head, expected = Head(model), [logits_alone(folder, example) for example in documents]
    digest = frozen_sha256(model)
    for order in ([0, 1, 2, 3, 4, 5], [2, 0, 4, 1, 5, 3]):  # what came before has no effect
        batches = [[documents[index]] for index in order], [[documents[i] for i in order[:3]], [documents[5]]]
        for batch in (batch for kind in batches for batch in kind):
            assert_equal(head, batch, [[number_of(example)] for example in batch], expected)
        packed = [join_documents([documents[i] for i in order[:3]]), join_documents([documents[i] for i in order[3:]])]
        assert_equal(head, packed, [order[:3], order[3:]], expected)
    assert frozen_sha256(model) == digest


def number_of(example: Example) -> int:
    return int(example.where.removeprefix("rows:"))


def assert_equal(head: Head, rows: list[Example], numbers: list[list[int]], expected: list[torch.Tensor]) -> None:
    """Every document of a micro-batch has the logits that it has alone."""
    batch = collate(rows, pad_id=0)
    hidden = head.hidden_states(batch.input_ids, batch.position_ids, batch.layout)
    logits = head(hidden)
    for row, documents in enumerate(numbers):
        starts = batch.layout.starts[row]
        for start, number in zip(starts, documents, strict=True):
            alone = expected[number]
            difference = (logits[row, start : start + len(alone)] - alone).abs().max()
            assert float(difference) < 2e-4 * float(alone.std()), (number, numbers)


def test_a_run_does_not_depend_on_the_micro_batch(folder_of: Folders, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    with data.open("w") as file:
        for number, length in enumerate((40, 50, 150, 120, 100, 130)):
            file.write(json.dumps({"text": f"{number}" + "abcdefghij" * (length // 10)}) + "\n")
    results = {}
    for micro_batch in (1, 6):
        options = (
            "train.max_steps=2",
            "train.global_batch=6",
            f"train.micro_batch={micro_batch}",
            "data.max_length=200",
        )
        recipe = recipe_of(
            folder_of("longrope"), data, tmp_path / f"run{micro_batch}", *options, quant={"kind": "dense"}
        )
        run(recipe)
        assert (tmp_path / f"run{micro_batch}" / "run.json").exists()
        results[micro_batch] = metrics(tmp_path / f"run{micro_batch}")
    for first, second in zip(results[1], results[6], strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)
    assert adapter_tensors(tmp_path / "run1")


def test_check_says_which_lengths_have_which_frequencies(folder_of: Folders, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"text": "abc"}) + "\n")
    result: dict[str, Any] = {"ok": False, "problems": [], "warnings": [], "data": None, "memory": None}
    check_contents(recipe_of(folder_of("longrope"), data, tmp_path / "run", "data.max_length=200"), result)
    assert any("documents above 64 tokens" in finding["message"] for finding in result["warnings"])
    assert result["ok"], result["problems"]
    model = loaded(folder_of("dynamic"))
    assert "scaled to their length" in str(describe_lengths(model, ORIGINAL + 1))
    assert describe_lengths(model, ORIGINAL) is None


def test_lengths_are_those_of_documents_without_padding() -> None:
    known = lengths_from_starts(((0, 3), (0,)), (5, 2), 6)
    assert known.tolist() == [[3, 3, 3, 2, 2, 2], [2] * 6]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    assert lengths_from_positions(positions).tolist() == [[3] * 6, [6] * 6]
    assert lengths_from_positions(torch.tensor([[70], [3]])).tolist() == [[71], [4]]  # one token after a cache


def test_other_rotary_embeddings_stay_as_their_class_made_them(zoo: Callable[..., Path]) -> None:
    model = loaded(zoo("llama"))
    assert not any(isinstance(module, DocumentRotary) for module in model.modules())
