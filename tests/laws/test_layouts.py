"""Laws of the layouts: a loaded model is transformers' own, no tensor is lost, a merge restores all keys."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.expert_families import EXPERT_FAMILIES, save_family
from support.small_runs import metrics, recipe_of, run, write_records
from support.wrapper_families import WRAPPER_FAMILIES, save_wrapper
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from qlora.errors import BaseModelError
from qlora.exporters import ExportRequest
from qlora.exporters.export_run import export_run
from qlora.model import Model
from qlora.model.layouts.checkpoint_layout import read_layout
from qlora.model.lm_head import Head
from qlora.model.load_base import Base, load
from qlora.model.meta_model import build_meta_model, read_config
from qlora.model.open_checkpoint import open_checkpoint
from qlora.quant import Quant, build_quantizer
from qlora.quant.linear import FrozenLinear
from qlora.runs.load_run import load_run
from qlora.training.base_check import compare_base

IDS = torch.randint(40, 200, (2, 40), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.arange(40).expand(2, -1)
FAMILIES = [*EXPERT_FAMILIES, *(f"{name} wrapper" for name in WRAPPER_FAMILIES)]
SINGLE = "model.safetensors"


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def save(family: str) -> Path:
        if family not in folders:
            name, _, wrapper = family.partition(" ")
            folder = tmp_path_factory.mktemp(name)
            folders[family] = save_wrapper(folder, name) if wrapper else save_family(folder, name)
        return folders[family]

    return save


def loaded(folder: Path, **quant: Any) -> Base:
    section = Quant(**quant)
    return load(Model(name=str(folder)), build_quantizer(section), torch.device("cpu"))


def transformers_model(folder: Path, family: str) -> tuple[Any, Any]:
    factory = AutoModelForImageTextToText if family.endswith("wrapper") else AutoModelForCausalLM
    model, info = factory.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), info


def skeleton_of(folder: Path) -> Any:
    return build_meta_model(read_config(folder), torch.float32, "auto", torch.device("cpu"))


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    head = Head(model)
    return head(head.hidden_states(IDS, POSITIONS))


@pytest.mark.sample(of=8)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_computes_what_transformers_computes(family: str, folder_of: Any) -> None:
    folder = folder_of(family)
    base = loaded(folder, kind="dense")
    model, _ = transformers_model(folder, family)
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
    assert torch.allclose(logits_of(base.model), expected, atol=1e-5 * float(expected.std()), rtol=0)
    quantized = loaded(folder, block=32)
    assert compare_base(quantized.model).largest_difference < 1e-5  # transformers' class on the dequantized weights
    layers = {path for path, layer in quantized.model.named_modules() if isinstance(layer, FrozenLinear)}
    assert layers == set(quantized.manifest.quantized)
    layout = read_layout(skeleton_of(folder), open_checkpoint(folder))
    accounted = {*quantized.manifest.kept, *(f"{path}.{leaf}" for path in layers for leaf in ("weight", "bias"))}
    for key in load_file(folder / SINGLE):
        names = {source.name for source in layout.by_key.get(key, [])}
        assert names <= accounted and bool(names) != (key in quantized.manifest.ignored), key
    assert all(not key.startswith(("model.layers", "model.language_model")) for key in quantized.manifest.ignored)


@pytest.mark.sample(of=16)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_restores_every_key_and_the_trained_logits(family: str, folder_of: Any, tmp_path: Path) -> None:
    folder, data = folder_of(family), write_records(tmp_path / "rows.jsonl", 12)
    settings = ("train.max_steps=2", "data.packing=true", "optim.learning_rate=0.02")
    run(recipe_of(folder, data, tmp_path / "run", *settings, quant={"kind": "nf4", "block": 32}))
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0]
    trained = load_run(str(tmp_path / "run"))
    export_run(trained, ExportRequest(to="merged", dtype="float32"), str(tmp_path / "merged"))
    model, info = transformers_model(tmp_path / "merged", family)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
    logits = logits_of(trained.base.model)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert torch.allclose(logits, expected, atol=1e-4 * float(expected.std()), rtol=0)
    before, after = load_file(folder / SINGLE), load_file(tmp_path / "merged" / SINGLE)
    assert before.keys() == after.keys()
    for key in [*trained.base.manifest.ignored, *(key for key in before if "norm" in key or "embed" in key)]:
        assert before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]), key


def changed(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, target / SINGLE, metadata={"format": "pt"})
    return target


GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "half an expert": (lambda tensors: tensors.pop(GATE), "part 1 of 2 is missing"),
    "no expert": (
        lambda tensors: [tensors.pop(GATE.replace("gate", name)) for name in ("gate", "up", "down")],
        "lacks model.layers.1.mlp.experts",
    ),
    "an expert too many": (
        lambda tensors: tensors.update({GATE.replace(".2.", ".4."): tensors[GATE].clone()}),
        "config.json has 4 experts",
    ),
    "another shape": (lambda tensors: tensors.update({GATE: tensors[GATE][:16].clone()}), "config.json needs"),
    "not finite": (lambda tensors: tensors[GATE][0].fill_(torch.nan), "NaN"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_expert_is_refused_by_name(damage: str, folder_of: Any, tmp_path: Path) -> None:
    change, problem = DAMAGE[damage]
    folder = changed(folder_of("qwen3_moe"), tmp_path / "damaged", change)
    with pytest.raises(BaseModelError, match=problem) as caught:
        loaded(folder)
    assert "experts" in str(caught.value) and "\n" not in str(caught.value)


def test_a_stack_in_no_registry_stays_frozen_and_is_named(folder_of: Any) -> None:
    base = loaded(folder_of("llama4_text"))
    assert base.manifest.left_out["model.layers.0.feed_forward.experts.gate_up_proj"].startswith("Llama4TextExperts")
    assert any("gate_up_proj" in note for note in base.notes)
