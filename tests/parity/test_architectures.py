"""Every class that AutoModelForCausalLM builds: equal to transformers and trained, or refused in one line.

`check` agrees with `train` on each. Classes with experts are compared with transformers (tests/laws/test_layouts.py).
"""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.architecture_table import EXPERTS_NOT_BUILT, NOT_BUILT, PACKED, REFUSED, SLOW, UNPACKED, WITH_EXPERTS
from support.architectures import KINDS, expert_settings, random_model, save_with_tokenizer
from support.expert_families import EXPERT_FAMILIES
from support.small_runs import recipe_of, write_records
from support.tiny_models import byte_tokenizer
from torch.nn import functional as F

from qlora.adapters.inject import adapted
from qlora.data.batching.collate import collate
from qlora.data.batching.join import join_documents
from qlora.data.batching.packing import split_documents
from qlora.data.conversations.encoder import Encoder
from qlora.data.prepare import Prepared, prepare
from qlora.data.types import Example
from qlora.errors import DataError, InputError
from qlora.model import Model
from qlora.model.lm_head import Head
from qlora.model.load_base import load
from qlora.quant import Quant, build_quantizer
from qlora.recipe.check import check_contents
from qlora.recipe.check_model import check_packing, check_targets, structure_of
from qlora.recipe.recipe import Recipe
from qlora.runs.resources import unplanned
from qlora.runs.setup import add_adapters_and_data, build_job, open_base
from qlora.runs.trained_template import TrainedEncoder
from qlora.runs.write_artifacts import RunSetup
from qlora.training.base_check import compare_base
from qlora.training.checkpoint import Position
from qlora.training.loop import fit
from qlora.training.loss import TokenLoss
from qlora.training.packing_probe import refuse_leaks
from qlora.training.run_log import Log
from qlora.training.signals import StopSignal

LEAK = "packed documents attend to each other"
LENGTHS = (3, 30, 17)


def kinds(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Two packed sequences of plain text, which all classes train on."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    texts = ["red green blue one two", "three cat", "dog sun moon red", "green", "blue one"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = recipe_for(path.parent, path.parent / "run", True, str(path))
    data = prepare(recipe.data, Encoder(byte_tokenizer(None), "assistant"), recipe.train.seed)
    assert any(len(sequence.document_starts()) > 1 for sequence in data.train)
    return data


def recipe_for(model: Path, output: Path, packing: bool, data: str = "rows.jsonl") -> Recipe:
    options = ("train.max_steps=2", "train.micro_batch=4", f"data.packing={packing}", "data.max_length=64")
    return recipe_of(model, Path(data), output, *options, quant={"kind": "dense"}, optim={"learning_rate": 1e-2})


def problem_of_check(recipe: Recipe, prepared: Prepared) -> str:
    """What `qlora check` reports as a problem; empty if nothing."""
    try:
        structure = structure_of(recipe)
        check_targets(recipe, structure)
        check_packing(prepared, structure)
    except InputError as error:
        return str(error)
    return ""


def train_setup(recipe: Recipe, prepared: Prepared) -> tuple[RunSetup, Log]:
    log = Log(Path(recipe.train.output), quiet=True)
    log.truncate(0)
    resources = unplanned(recipe)
    base = open_base(recipe, resources.processes, None, log)
    return add_adapters_and_data(recipe, resources, base, log, lambda *_: (prepared, TrainedEncoder())), log


def documents() -> list[Example]:
    draw = np.random.default_rng(0)
    ids = [draw.integers(40, 250, length).astype(np.int32) for length in LENGTHS]
    return [Example(f"{number}", values, values) for number, values in enumerate(ids)]


def logits_alone(reference: Any, document: Example) -> torch.Tensor:
    ids = torch.from_numpy(document.input_ids.astype(np.int64))[None]
    return reference(input_ids=ids, use_cache=False).logits[0]  # type: ignore[no-any-return]


@torch.no_grad()
def assert_equal(model: Any, reference: Any, sequences: list[list[Example]]) -> None:
    """Logits and loss of packed or single documents are those that transformers gives each document alone."""
    batch = collate([join_documents(documents) for documents in sequences], pad_id=0)
    head, loss = Head(model), TokenLoss(model)
    logits = head(head.hidden_states(batch.input_ids, batch.position_ids, batch.layout))
    expected_loss = torch.zeros(())
    for row, (packed, starts) in enumerate(zip(sequences, batch.layout.starts, strict=True)):
        for document, start in zip(packed, starts, strict=True):
            alone = logits_alone(reference, document)
            own = logits[row, start : start + len(document)]
            assert float((own - alone).abs().max()) < 1e-3 * float(alone.std()), (len(document), start)
            targets = torch.from_numpy(document.labels.astype(np.int64))
            expected_loss += F.cross_entropy(alone[:-1], targets[1:], reduction="sum")
    total = loss(batch.input_ids, batch.labels, batch.position_ids, batch.layout)
    assert float(total) == pytest.approx(float(expected_loss), rel=1e-4)


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("kind", kinds([*PACKED, *UNPACKED]))
def test_a_class_computes_what_transformers_computes_and_trains(kind: str, prepared: Prepared, tmp_path: Path) -> None:
    reference = random_model(kind)
    recipe = recipe_for(save_with_tokenizer(reference, tmp_path / "model", None), tmp_path / "run", kind in PACKED)
    problem = problem_of_check(recipe, prepared)
    assert problem == "" if kind in PACKED else LEAK in problem, problem
    setup, log = train_setup(recipe, prepared if kind in PACKED else alone(prepared))
    model = setup.base.model
    assert_equal(model, reference, [[document] for document in documents()])
    packed = [documents()[:2], documents()[1:]]
    if kind in PACKED:
        assert_equal(model, reference, packed)
    else:
        with pytest.raises(DataError, match=LEAK):
            refuse_leaks(TokenLoss(model), prepared.train, torch.float32, setup.processes.device)
    job = build_job(setup, log, StopSignal())
    log.redraw_report = lambda: None
    before = mean_loss(job.model, setup.data.train)
    fit(job, Position())
    unchanged = [path for path, layer in adapted(model).items() if not layer.B.any()]
    assert adapted(model) and unchanged == []
    assert mean_loss(job.model, setup.data.train) < before


def alone(prepared: Prepared) -> Prepared:
    """The same data without packing."""
    documents = [document for sequence in prepared.train for document in split_documents(sequence)]
    return replace(prepared, train=documents)


@torch.no_grad()
def mean_loss(loss: Any, sequences: Any) -> float:
    batch = collate(list(sequences), pad_id=0)
    total = loss.eval()(batch.input_ids, batch.labels, batch.position_ids, batch.layout)
    loss.train()
    return float(total) / batch.trained_tokens


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("kind", kinds(REFUSED))
def test_a_class_that_does_not_work_is_refused_in_one_line(kind: str, prepared: Prepared, tmp_path: Path) -> None:
    recipe = recipe_for(save_with_tokenizer(random_model(kind), tmp_path / "model", None), tmp_path / "run", True)
    with pytest.raises(InputError, match=REFUSED[kind]) as caught:
        train_setup(recipe, prepared)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert re.search(REFUSED[kind], problem_of_check(recipe, prepared))


@pytest.mark.parametrize("kind", ["cohere", "mamba", "gpt2"])  # the planner knows the shapes of none
def test_an_unknown_plan_is_a_warning(kind: str, tmp_path: Path) -> None:
    folder = save_with_tokenizer(random_model(kind), tmp_path / "model")
    recipe = recipe_for(folder, tmp_path / "run", False, str(write_records(tmp_path / "rows.jsonl", 4)))
    result: dict[str, Any] = {"ok": False, "problems": [], "warnings": [], "data": None, "memory": None}
    check_contents(recipe, result)
    assert any(warning["message"].startswith("no memory plan") for warning in result["warnings"])
    assert [problem["where"] for problem in result["problems"]] == (["adapter.targets"] if kind == "gpt2" else [])


@pytest.mark.sample(of=12)
@pytest.mark.parametrize("kind", WITH_EXPERTS)
def test_a_class_with_experts_computes_what_transformers_computes(kind: str, tmp_path: Path) -> None:
    folder = save_with_tokenizer(random_model(kind, expert_settings(kind)), tmp_path / "model")
    base = load(Model(name=str(folder)), build_quantizer(Quant(block=32)), torch.device("cpu"))
    assert compare_base(base.model).largest_difference < 1e-5


def test_every_class_is_in_the_table() -> None:
    dense, sparse = {*PACKED, *UNPACKED, *REFUSED, *NOT_BUILT}, {*WITH_EXPERTS, *EXPERTS_NOT_BUILT, *EXPERT_FAMILIES}
    assert len({*PACKED, *UNPACKED} - {*SLOW}) >= 60
    assert set(KINDS) - dense - sparse == set() and dense | {*WITH_EXPERTS, *EXPERTS_NOT_BUILT} <= {*KINDS}
