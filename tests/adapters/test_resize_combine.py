"""Resized and combined adapters are what they say, for PEFT as well, and only adapters of one base add up."""

import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.command_line import qlora
from support.small_runs import recipe_of, run, write_rows
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora.adapters import peft_files
from qlora.adapters.plain_lora import folded
from qlora.runs.artifacts import MANIFEST
from qlora.utils.atomic_files import sha256_of

Zoo = Callable[..., Path]
pytestmark = pytest.mark.xdist_group("rework")
IDS = torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(0))
FAMILY = "llama-tied-bias"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 12)


@pytest.fixture(scope="module")
def make(zoo: Zoo, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make("rslora", "adapter.rank=16", seed=1)`: a finished run, made once."""
    made: dict[str, Path] = {}

    def run_of(kind: str, *overrides: str, seed: int = 0, model: int = 0) -> Path:
        key = f"{kind}-{'-'.join(overrides)}-{seed}-{model}"
        if key not in made:
            output = tmp_path_factory.mktemp("run") / "run"
            shown = (f"adapter.kind={kind}", f"train.seed={seed}", "train.max_steps=2", "optim.learning_rate=0.02")
            run(recipe_of(zoo(FAMILY, seed=model), data, output, *shown, "data.eval_fraction=0.25", *overrides))
            made[key] = output
        return made[key]

    return run_of


def planted(source: Path, folder: Path, true_rank: int) -> Path:
    """A copy of a run whose updates all have `true_rank` directions, spread over the whole of A and B."""
    copy = Path(shutil.copytree(source, folder))
    tensors = load_file(copy / peft_files.WEIGHTS)
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        a, b = tensors[name], tensors[other := name.replace("lora_A", "lora_B")]
        turn = torch.linalg.qr(torch.randn(len(a), len(a), generator=generator)).Q[:, :true_rank]
        tensors[name] = (turn @ torch.randn(true_rank, a.shape[1], generator=generator) * 0.05).contiguous()
        tensors[other] = (torch.randn(b.shape[0], true_rank, generator=generator) @ turn.t() * 0.05).contiguous()
    save_file(tensors, copy / peft_files.WEIGHTS, {"format": "pt", peft_files.FINGERPRINT: fingerprint(source)})
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][peft_files.WEIGHTS] = sha256_of(copy / peft_files.WEIGHTS)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return copy


def fingerprint(folder: Path) -> str:
    return str(peft_files.read(folder).base_sha256)


def deltas(folder: Path) -> dict[str, Tensor]:
    return {path: b.double() @ a.double() for path, (a, b) in folded(peft_files.read(folder)).items()}


@torch.no_grad()
def logits_of_peft(zoo: Zoo, adapter: Path) -> Tensor:
    base = AutoModelForCausalLM.from_pretrained(zoo(FAMILY), dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter).eval()(input_ids=IDS).logits


# ---- inspect


def test_a_planted_rank_is_reported_suggested_and_kept_by_resize(make: Any, data: Path, tmp_path: Path) -> None:
    source = planted(make("lora", "adapter.rank=16"), tmp_path / "planted", 3)
    found = qlora("inspect", source, "--json").json
    assert {"layers", "suggested_rank", "verdict"} <= found.keys()
    assert all(layer["energy_90_rank"] == 3 and layer["rank"] == 16 for layer in found["layers"])
    assert all(layer["dead_directions"] == 13 for layer in found["layers"])
    assert found["verdict"] == "too high" and found["suggested_rank"] in (3, 4)
    assert qlora("resize", source, tmp_path / "small", "--rank", found["suggested_rank"]).code == 0
    before, after = (qlora("eval", folder, "--data", data, "--json").json for folder in (source, tmp_path / "small"))
    assert before["rows"] == after["rows"] == 12 and abs(before["loss"] - after["loss"]) < 1e-3
    worse = qlora("resize", source, tmp_path / "smaller", "--rank", 1, "--json").json
    assert worse["energy_kept"] < 0.9


def test_the_ratio_is_that_of_the_stored_matrices(make: Any, zoo: Zoo) -> None:
    source = make("rslora", "adapter.rank=8")
    found = qlora("inspect", source, "--rank-curve", "--json").json
    stored = load_file(zoo(FAMILY) / "model.safetensors")
    ours = deltas(source)
    assert len(found["layers"]) == 14
    for layer in found["layers"]:
        ratio = float(ours[layer["name"]].norm() / stored[f"{layer['name']}.weight"].double().norm())
        assert layer["delta_norm_ratio"] == pytest.approx(ratio, rel=1e-5)  # A and B are float32
    curve = found["rank_curve"]
    assert curve["ranks"] == [1, 2, 4, 8] and len(curve["updates"]) == 14
    for falling in (*(each["error"] for each in curve["updates"]), *(each["error"] for each in curve["base"])):
        assert falling == sorted(falling, reverse=True) and falling[-1] == pytest.approx(0, abs=1e-6)
    one = next(each for each in curve["base"] if each["name"].endswith("up_proj"))
    values = torch.linalg.svdvals(stored[f"{one['name']}.weight"].double())
    assert one["error"][0] == pytest.approx(float(values[1:].norm() / values.norm()), rel=1e-4)


def test_an_adapter_whose_base_is_not_here_is_inspected_without_the_ratio(make: Any, tmp_path: Path) -> None:
    source = Path(shutil.copytree(make("lora"), tmp_path / "alone"))
    (source / "recipe.yaml").unlink()
    (source / "run.json").unlink()
    config = json.loads((source / peft_files.CONFIG).read_text())
    for base in ("nobody/nothing", "./gone", None):
        (source / peft_files.CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": base}))
        said = qlora("inspect", source, "--json")
        assert all(layer["delta_norm_ratio"] is None for layer in said.json["layers"]) and "left out" in said.err


def test_the_picture_is_one_whole_svg_with_a_cell_a_direction(make: Any, tmp_path: Path) -> None:
    said = qlora("inspect", make("lora"), "--picture", tmp_path / "spectrum.svg")
    assert said.code == 0 and said.out == "" and "stable" in said.err
    root = ET.fromstring((tmp_path / "spectrum.svg").read_text())
    assert root.tag.endswith("svg") and len([part for part in root if part.tag.endswith("rect")]) == 14 * 4
    refused = qlora("inspect", make("lora"), "--picture", tmp_path / "gone" / "spectrum.svg")
    assert refused.code == 2 and "gone" in refused.err


# ---- resize and combine


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_resized_it_is_the_best_approximation_for_peft_as_well(make: Any, zoo: Zoo, kind: str, tmp_path: Path) -> None:
    source = make(kind, "adapter.rank=8")
    found = qlora("resize", source, tmp_path / "small", "--rank", 7, "--json").json
    before, after = deltas(source), deltas(tmp_path / "small")
    assert before.keys() == after.keys()
    lost = sum(float((before[path] - after[path]).norm() ** 2) for path in before)
    whole = sum(float(before[path].norm() ** 2) for path in before)
    assert 1 - found["energy_kept"] == pytest.approx(lost / whole, rel=1e-3, abs=1e-7)
    dense = AutoModelForCausalLM.from_pretrained(zoo(FAMILY), dtype=torch.float32).eval()
    with torch.no_grad():
        for path, delta in after.items():
            dense.get_submodule(path).weight += delta.float()
        expected = dense(input_ids=IDS).logits
    torch.testing.assert_close(logits_of_peft(zoo, tmp_path / "small"), expected, rtol=0, atol=1e-4)


def test_a_resized_run_is_taken_by_every_verb_as_the_run_was(make: Any, tmp_path: Path) -> None:
    source, small = make("lora", "quant.kind=fp4"), tmp_path / "small"
    assert qlora("resize", source, small, "--rank", 3).code == 0
    names = {path.name for path in small.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "recipe.yaml", "run.json", "README.md"} <= names
    assert (small / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert "kind: fp4" in (small / "recipe.yaml").read_text() and fingerprint(small) == fingerprint(source)
    assert str(tmp_path) not in (small / "README.md").read_text()
    assert qlora("eval", small, "--json").json["rows"] == 3
    assert qlora("resize", small, tmp_path / "smaller", "--rank", 2).code == 0
    content = bytearray((small / peft_files.WEIGHTS).read_bytes())
    content[-5] ^= 1
    (small / peft_files.WEIGHTS).write_bytes(bytes(content))
    assert "damaged" in qlora("eval", small).err


def test_combined_it_is_the_weighted_sum(make: Any, zoo: Zoo, tmp_path: Path) -> None:
    one, other = make("lora"), make("rslora", "adapter.rank=2", "adapter.targets=[q_proj,down_proj]", seed=1)
    words = (f"a={one}:0.75", f"b={other}:-2")
    found = qlora("combine", tmp_path / "sum", *words, "--json").json
    assert found["rank"] == 6 and found["exact"] is True
    first, second, whole = deltas(one), deltas(other), deltas(tmp_path / "sum")
    assert whole.keys() == first.keys() and second.keys() < first.keys()
    for path, delta in whole.items():
        expected = 0.75 * first[path] + (-2 * second[path] if path in second else 0)
        torch.testing.assert_close(delta, expected, rtol=0, atol=1e-7 + 1e-6 * float(expected.abs().max()))
    rows = qlora("eval", tmp_path / "sum", "--json").json["rows"]
    assert rows == 3 and torch.isfinite(logits_of_peft(zoo, tmp_path / "sum")).all()
    short = qlora("combine", tmp_path / "short", *words, "--rank", 5, "--json").json
    lost = sum(float((whole[path] - delta).norm() ** 2) for path, delta in deltas(tmp_path / "short").items())
    size = sum(float(delta.norm() ** 2) for delta in whole.values())
    assert short["exact"] is False and 1 - short["energy_kept"] == pytest.approx(lost / size, rel=1e-3, abs=1e-7)


def test_an_adapter_taken_from_itself_leaves_the_base(make: Any, zoo: Zoo, tmp_path: Path) -> None:
    assert qlora("combine", tmp_path / "none", f"a={make('lora')}", f"b={make('lora')}:-1").code == 0
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(zoo(FAMILY), dtype=torch.float32).eval()(input_ids=IDS).logits
    torch.testing.assert_close(logits_of_peft(zoo, tmp_path / "none"), base, rtol=0, atol=1e-5)


def test_what_cannot_be_meant_is_refused_and_leaves_nothing(make: Any, tmp_path: Path) -> None:
    run, other = make("lora"), make("lora", model=1)
    shutil.copytree(run, tmp_path / "there")
    cases = {
        ("resize", run, tmp_path / "out", "--rank", 4): ("--rank", "rank 4", "1 to 3"),
        ("resize", run, tmp_path / "there", "--rank", 2): ("already",),
        ("resize", tmp_path, tmp_path / "out", "--rank", 2): ("adapter_config.json",),
        ("combine", tmp_path / "out", f"a={run}", f"b={other}"): ("other weights", "b"),
        ("combine", tmp_path / "out", f"a={run}"): ("2 adapters",),
        ("combine", tmp_path / "out", f"a={run}", f"a={run}"): ("twice",),
        ("combine", tmp_path / "out", f"a={run}", str(run)): ("NAME=PATH",),
        ("combine", tmp_path / "out", f"a={run}", f"../b={run}"): ("NAME=PATH",),
        ("combine", tmp_path / "out", f"a={run}", f"b={run}:inf"): ("weight",),
        ("combine", tmp_path / "out", f"a={run}", f"b={run}:nan"): ("weight",),
        ("inspect", tmp_path / "gone"): ("gone",),
    }
    for words, named in cases.items():
        said = qlora(*words)
        assert said.code == 2 and said.out == "" and said.err.count("error: ") == 1, said.err
        assert all(word in said.err for word in named), said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]
