"""`qlora inspect`, `resize` and `combine`: figures and written adapters equal dense computations, in PEFT as well."""

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
from support.adapted_models import load_plain, logits
from support.command_line import qlora
from support.small_runs import recipe_of, run, write_records
from torch import Tensor

from qlora.adapters import peft_files
from qlora.adapters.plain_lora import fold_scaling
from qlora.runs.artifacts import MANIFEST
from qlora.utils.atomic_files import sha256_of

Zoo = Callable[..., Path]
FAMILY = "llama-tied-bias"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("records") / "records.jsonl", 12)


@pytest.fixture(scope="module")
def train(zoo: Zoo, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`train("rslora", "adapter.rank=16", seed=1)`: a finished run, trained once."""
    runs: dict[str, Path] = {}

    def run_of(kind: str, *overrides: str, seed: int = 0, model: int = 0) -> Path:
        key = f"{kind}-{'-'.join(overrides)}-{seed}-{model}"
        if key not in runs:
            output = tmp_path_factory.mktemp("run") / "run"
            options = (f"adapter.kind={kind}", f"train.seed={seed}", "train.max_steps=2", "optim.learning_rate=0.02")
            run(recipe_of(zoo(FAMILY, seed=model), data, output, *options, "data.eval_fraction=0.25", *overrides))
            runs[key] = output
        return runs[key]

    return run_of


def plant_rank(source: Path, folder: Path, true_rank: int) -> Path:
    """A copy of a run whose updates all have `true_rank` directions, spread over all of A and B."""
    copy = Path(shutil.copytree(source, folder))
    tensors = load_file(copy / peft_files.WEIGHTS)
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        a, b = tensors[name], tensors[b_name := name.replace("lora_A", "lora_B")]
        basis = torch.linalg.qr(torch.randn(len(a), len(a), generator=generator)).Q[:, :true_rank]
        tensors[name] = (basis @ torch.randn(true_rank, a.shape[1], generator=generator) * 0.05).contiguous()
        tensors[b_name] = (torch.randn(b.shape[0], true_rank, generator=generator) @ basis.t() * 0.05).contiguous()
    save_file(tensors, copy / peft_files.WEIGHTS, {"format": "pt", peft_files.FINGERPRINT: fingerprint(source)})
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][peft_files.WEIGHTS] = sha256_of(copy / peft_files.WEIGHTS)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return copy


def fingerprint(folder: Path) -> str:
    return str(peft_files.read(folder).base_sha256)


def deltas(folder: Path) -> dict[str, Tensor]:
    return {path: b.double() @ a.double() for path, (a, b) in fold_scaling(peft_files.read(folder)).items()}


def peft_logits(zoo: Zoo, adapter: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(load_plain(zoo(FAMILY)), adapter).eval())


# ---- inspect


def test_a_planted_rank_is_reported_suggested_and_kept_by_resize(train: Any, data: Path, tmp_path: Path) -> None:
    source = plant_rank(train("lora", "adapter.rank=8"), tmp_path / "planted", 3)
    report = qlora("inspect", source, "--json").json
    assert {"layers", "suggested_rank", "verdict"} <= report.keys()
    assert all(layer["energy_90_rank"] == 3 and layer["rank"] == 8 for layer in report["layers"])
    assert all(layer["dead_directions"] == 5 for layer in report["layers"])
    assert report["verdict"] == "too high" and report["suggested_rank"] in (3, 4)
    assert qlora("resize", source, tmp_path / "small", "--rank", report["suggested_rank"]).code == 0
    before, after = (qlora("eval", folder, "--data", data, "--json").json for folder in (source, tmp_path / "small"))
    assert before["rows"] == after["rows"] == 12 and abs(before["loss"] - after["loss"]) < 1e-3
    worse = qlora("resize", source, tmp_path / "smaller", "--rank", 1, "--json").json
    assert worse["energy_kept"] < 0.9


def test_the_norm_ratio_is_that_of_the_stored_matrices(train: Any, zoo: Zoo) -> None:
    source = train("rslora", "adapter.rank=8")
    report = qlora("inspect", source, "--rank-curve", "--json").json
    stored = load_file(zoo(FAMILY) / "model.safetensors")
    updates = deltas(source)
    assert len(report["layers"]) == 14
    for layer in report["layers"]:
        ratio = float(updates[layer["name"]].norm() / stored[f"{layer['name']}.weight"].double().norm())
        assert layer["delta_norm_ratio"] == pytest.approx(ratio, rel=1e-5)  # A and B are float32
    curve = report["rank_curve"]
    assert curve["ranks"] == [1, 2, 4, 8] and len(curve["updates"]) == 14
    for errors in (layer["error"] for layer in (*curve["updates"], *curve["base"])):
        assert errors == sorted(errors, reverse=True) and errors[-1] == pytest.approx(0, abs=1e-6)
    layer = next(layer for layer in curve["base"] if layer["name"].endswith("up_proj"))
    values = torch.linalg.svdvals(stored[f"{layer['name']}.weight"].double())
    assert layer["error"][0] == pytest.approx(float(values[1:].norm() / values.norm()), rel=1e-4)


def test_an_adapter_without_its_base_is_inspected_without_the_ratio(train: Any, tmp_path: Path) -> None:
    source = Path(shutil.copytree(train("lora"), tmp_path / "adapter"))
    (source / "recipe.yaml").unlink()
    (source / "run.json").unlink()
    config = json.loads((source / peft_files.CONFIG).read_text())
    for base in ("missing/base", "./gone", None):
        (source / peft_files.CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": base}))
        result = qlora("inspect", source, "--json")
        assert all(layer["delta_norm_ratio"] is None for layer in result.json["layers"]) and "left out" in result.err


def test_the_picture_is_an_svg_with_a_cell_per_direction(train: Any, tmp_path: Path) -> None:
    result = qlora("inspect", train("lora"), "--picture", tmp_path / "spectrum.svg")
    assert result.code == 0 and result.out == "" and "stable" in result.err
    root = ET.fromstring((tmp_path / "spectrum.svg").read_text())
    assert root.tag.endswith("svg") and len([element for element in root if element.tag.endswith("rect")]) == 14 * 4
    refused = qlora("inspect", train("lora"), "--picture", tmp_path / "spectrum.svg" / "x.svg")
    assert refused.code == 2 and "spectrum.svg is not a folder" in refused.err


# ---- resize and combine


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_a_resized_adapter_is_the_best_approximation_in_peft(train: Any, zoo: Zoo, kind: str, tmp_path: Path) -> None:
    source = train(kind, "adapter.rank=8")
    answer = qlora("resize", source, tmp_path / "small", "--rank", 7, "--json").json
    before, after = deltas(source), deltas(tmp_path / "small")
    assert before.keys() == after.keys()
    lost = sum(float((before[path] - after[path]).norm() ** 2) for path in before)
    total = sum(float(before[path].norm() ** 2) for path in before)
    assert 1 - answer["energy_kept"] == pytest.approx(lost / total, rel=1e-3, abs=1e-7)
    dense = load_plain(zoo(FAMILY))
    with torch.no_grad():
        for path, delta in after.items():
            dense.get_submodule(path).weight += delta.float()
    torch.testing.assert_close(peft_logits(zoo, tmp_path / "small"), logits(dense), rtol=0, atol=1e-4)


def test_every_command_accepts_a_resized_run(train: Any, tmp_path: Path) -> None:
    source, small = train("lora", "quant.kind=fp4"), tmp_path / "small"
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


def test_a_combined_adapter_is_the_weighted_sum(train: Any, zoo: Zoo, tmp_path: Path) -> None:
    first = train("lora")
    second = train("rslora", "adapter.rank=2", "adapter.targets=[q_proj,down_proj]", seed=1)
    terms = (f"a={first}:0.75", f"b={second}:-2")
    answer = qlora("combine", tmp_path / "sum", *terms, "--json").json
    assert answer["rank"] == 6 and answer["exact"] is True
    first_deltas, second_deltas, sums = deltas(first), deltas(second), deltas(tmp_path / "sum")
    assert sums.keys() == first_deltas.keys() and second_deltas.keys() < first_deltas.keys()
    for path, delta in sums.items():
        expected = 0.75 * first_deltas[path] + (-2 * second_deltas[path] if path in second_deltas else 0)
        torch.testing.assert_close(delta, expected, rtol=0, atol=1e-7 + 1e-6 * float(expected.abs().max()))
    rows = qlora("eval", tmp_path / "sum", "--json").json["rows"]
    assert rows == 3 and torch.isfinite(peft_logits(zoo, tmp_path / "sum")).all()
    short = qlora("combine", tmp_path / "short", *terms, "--rank", 5, "--json").json
    lost = sum(float((sums[path] - delta).norm() ** 2) for path, delta in deltas(tmp_path / "short").items())
    total = sum(float(delta.norm() ** 2) for delta in sums.values())
    assert short["exact"] is False and 1 - short["energy_kept"] == pytest.approx(lost / total, rel=1e-3, abs=1e-7)


def test_an_adapter_minus_itself_gives_the_base(train: Any, zoo: Zoo, tmp_path: Path) -> None:
    assert qlora("combine", tmp_path / "zero", f"a={train('lora')}", f"b={train('lora')}:-1").code == 0
    torch.testing.assert_close(peft_logits(zoo, tmp_path / "zero"), logits(load_plain(zoo(FAMILY))), rtol=0, atol=1e-5)


def test_invalid_requests_are_refused_and_write_nothing(train: Any, tmp_path: Path) -> None:
    adapter, other_base = train("lora"), train("lora", model=1)
    shutil.copytree(adapter, tmp_path / "existing")
    cases = {
        ("resize", adapter, tmp_path / "out", "--rank", 4): ("--rank", "rank 4", "1 to 3"),
        ("resize", adapter, tmp_path / "existing", "--rank", 2): ("already",),
        ("resize", tmp_path, tmp_path / "out", "--rank", 2): ("adapter_config.json",),
        ("combine", tmp_path / "out", f"a={adapter}", f"b={other_base}"): ("other weights", "b"),
        ("combine", tmp_path / "out", f"a={adapter}"): ("2 adapters",),
        ("combine", tmp_path / "out", f"a={adapter}", f"a={adapter}"): ("twice",),
        ("combine", tmp_path / "out", f"a={adapter}", str(adapter)): ("NAME=PATH",),
        ("combine", tmp_path / "out", f"a={adapter}", f"../b={adapter}"): ("NAME=PATH",),
        ("combine", tmp_path / "out", f"a={adapter}", f"b={adapter}:inf"): ("weight",),
        ("combine", tmp_path / "out", f"a={adapter}", f"b={adapter}:nan"): ("weight",),
        ("inspect", tmp_path / "gone"): ("gone",),
    }
    for arguments, texts in cases.items():
        refused = qlora(*arguments)
        assert refused.code == 2 and refused.out == "" and refused.err.count("error: ") == 1, refused.err
        assert all(text in refused.err for text in texts), refused.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["existing"]
