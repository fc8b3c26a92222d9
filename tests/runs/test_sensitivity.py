"""`qlora sensitivity` and `quant.keep: auto`: planted outliers are kept, KL falls, the choice beats others as large."""

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.command_line import qlora
from support.expert_models import save_expert_model
from support.paths import DEMO_BASE
from support.small_runs import recipe_of, run, write_records
from support.tiny_models import save_model

from qlora.distributed.processes import require_one_process
from qlora.errors import InputError
from qlora.model.download import find_model
from qlora.quant.kept_choice import MatrixError, choose_kept
from qlora.recipe.planning import Machine, Planner
from qlora.recipe.recipe import Recipe, from_mapping
from qlora.runs import sensitivity
from qlora.runs.kept_matrices import with_kept_matrices
from qlora.runs.load_run import load_run
from qlora.runs.matrix_errors import measure_kl
from qlora.runs.sensitivity import Sensitivity, measure_sensitivity
from qlora.utils.atomic_files import read_json

PLANTED = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.gate_proj")
TOKENS = 256


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "records.jsonl", 40)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with huge weights for a feature that is always zero: they take the 4-bit levels of all others."""
    folder = save_model(tmp_path_factory.mktemp("planted"), "llama")
    weights = load_file(folder / "model.safetensors")
    for path in PLANTED:
        weights[f"{path.rpartition('.mlp')[0]}.post_attention_layernorm.weight"][5] = 0.0
        weights[f"{path}.weight"][:, 5] = 20.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_planted_outlier_matrices_are_kept(planted: Path, records: Path, tmp_path: Path) -> None:
    recipe = recipe_of(planted, records, tmp_path, "quant.keep=auto", "quant.keep_bytes=140%")
    result = measure_sensitivity(recipe, tokens=TOKENS)
    assert {*result.kept} >= {*PLANTED}
    worst = sorted(result.matrices, key=lambda matrix: -matrix.error)[:2]
    assert {matrix.name for matrix in worst} == {*PLANTED} and worst[1].error > 0.5
    assert result.bytes <= result.budget_bytes == int(1.4 * result.packed_bytes)
    assert result.kl_after < 0.2 * result.kl_before


def test_matrices_are_kept_by_what_a_byte_saves() -> None:
    matrices = [
        MatrixError("large", 10, 0.1, 5.0, 1),
        MatrixError("small", 1, 0.1, 1.0, 1),
        MatrixError("unseen", 1, 0.0, 0.0, 0),
        MatrixError("middle", 6, 0.1, 2.4, 1),
    ]
    assert choose_kept(matrices, 10) == ["small", "middle"]  # what is left after the best one is too little for `large`
    assert choose_kept(matrices, 11) == ["large", "small"]
    assert choose_kept(matrices, 0) == [] and "unseen" not in choose_kept(matrices, 99)


def demo_recipe(*overrides: str) -> Recipe:
    data = DEMO_BASE.parent / "data"
    mapping = {
        "model": {"name": str(DEMO_BASE), "dtype": "float32"},
        "data": {"train": str(data / "train.jsonl"), "eval": str(data / "eval.jsonl"), "max_length": 128},
    }
    return from_mapping(mapping, overrides=["quant.keep=auto", "quant.keep_bytes=0.5", *overrides])[0]


@pytest.fixture(scope="module")
def demo() -> tuple[Recipe, Sensitivity]:
    recipe = demo_recipe()
    return recipe, measure_sensitivity(recipe, tokens=TOKENS)


def kl_of(recipe: Recipe, choices: Sequence[Sequence[str]]) -> list[float]:
    """KL to the 16-bit base on the held-out rows, for each choice of matrices."""
    data = sensitivity._prepare(recipe)
    base = sensitivity._open(recipe, find_model(recipe.model.name))
    rows = sensitivity.pick_sequences(data.eval, TOKENS)
    return measure_kl(base, rows, [frozenset(choice) for choice in choices])


def fitting(result: Sensitivity, order: Sequence[int]) -> list[str]:
    """Matrices in this order, as long as they fit the budget."""
    free, names = result.budget_bytes, []
    for matrix in (result.matrices[number] for number in order):
        if matrix.bytes <= free:
            free -= matrix.bytes
            names.append(matrix.name)
    return names


def test_kl_falls_with_the_budget_and_is_below_that_of_other_choices(
    demo: tuple[Recipe, Sensitivity],
) -> None:
    recipe, result = demo
    shares = (0.0, 0.15, 0.5, 1.5, 8.0)
    nested = [choose_kept(result.matrices, int(share * result.packed_bytes)) for share in shares]
    count, draw = len(result.matrices), random.Random(0)
    evenly = sorted(range(count), key=lambda number: number * 5 % count)
    others = [fitting(result, draw.sample(range(count), count)) for _ in range(3)]
    budgets = kl_of(recipe, [*nested, fitting(result, evenly), *others])
    falling, (chosen, *compared) = budgets[: len(shares)], budgets[2:3] + budgets[len(shares) :]
    assert all(after < before for before, after in pairwise(falling))
    assert falling[-1] == pytest.approx(0.0, abs=1e-6)  # everything stays in 16 bits
    assert chosen < 0.8 * min(compared)


def test_experts_are_measured_one_by_one_and_kept_through_a_run(records: Path, tmp_path: Path) -> None:
    model = save_expert_model(tmp_path / "model", "qwen3_moe")
    recipe = recipe_of(model, records, tmp_path / "run", "quant.keep=auto", "quant.keep_bytes=20%", "train.max_steps=1")
    manifest = run(recipe)
    choice = read_json(tmp_path / "run" / "sensitivity.json")
    experts = [matrix for matrix in choice["matrices"] if ".experts." in matrix["name"]]
    assert len(experts) == 2 * 2 * 4  # layers, stacks, experts
    visits = [matrix["tokens"] for matrix in experts if ".gate_up_proj." in matrix["name"]]
    assert sum(visits) == 2 * 2 * choice["tokens"]  # layers, experts that a token visits
    base = load_run(str(tmp_path / "run")).base.manifest
    assert [name for name, matrix in base.quantized.items() if matrix["kind"] == "dense"] == choice["kept"]
    assert manifest["kept_matrices"]["bytes"] == choice["bytes"] > 0
    plan = Planner(load_run(str(tmp_path / "run")).recipe).plan(Machine.local()).work
    assert plan.all_layer_bytes + plan.outside_bytes == choice["packed_bytes"] + choice["bytes"]


def test_a_choice_is_written_reused_and_never_made_again(planted: Path, records: Path, tmp_path: Path) -> None:
    recipe = recipe_of(planted, records, tmp_path, "quant.keep=auto", "quant.keep_bytes=140%", "train.save_every=3")
    auto = Planner(recipe).plan(Machine.local()).work
    run(recipe)
    path = tmp_path / "sensitivity.json"
    first = path.read_bytes()
    chosen = load_run(str(tmp_path)).recipe.quant
    assert (
        chosen.keep == tuple(json.loads(first)["kept"]) and json.loads(chosen.model_dump_json())["keep_bytes"] is None
    )
    assert auto.outside_bytes == json.loads(first)["budget_bytes"]  # what the plan counts before the choice is made
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": 7})})
    assert run(longer)["result"]["steps"] == 7
    assert path.read_bytes() == first
    path.unlink()
    assert with_kept_matrices(recipe, tmp_path).quant.keep == chosen.keep  # measured again, it is the same
    again, old = json.loads(path.read_bytes()), json.loads(first)
    assert again | {"peak_bytes": 0} == old | {"peak_bytes": 0}


def test_what_is_not_quantized_has_no_error(records: Path, tmp_path: Path, planted: Path) -> None:
    with pytest.raises(InputError, match=r"quant\.kind: dense quantizes nothing"):
        measure_sensitivity(recipe_of(planted, records, tmp_path, "quant.kind=dense"))


def test_the_command_prints_what_the_contract_says(planted: Path, records: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model: {{name: {planted}, dtype: float32}}\ndata: {{train: {records}}}\n")
    result = qlora("sensitivity", tmp_path / "recipe.yaml", "--keep-bytes", "140%", "--json").json
    assert {*result} >= {"matrices", "kept", "kl_before", "kl_after", "bytes"}
    assert all({*matrix} >= {"name", "bytes", "error"} for matrix in result["matrices"])
    assert {*result["kept"]} >= {*PLANTED} and result["kl_after"] < result["kl_before"]
    assert qlora("sensitivity", tmp_path / "recipe.yaml", "--keep-bytes", "5 apples").code == 2


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="qlora sensitivity runs in one process, but the launcher started 2"):
        require_one_process("sensitivity")
