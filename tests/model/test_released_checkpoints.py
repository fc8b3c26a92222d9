"""Released quantized checkpoints: loaded, trained on and merged like the 16-bit checkpoint they are decoded to."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapted_models import load_plain
from support.released_formats import FP8, WRITERS, write_decoded, write_released
from support.small_runs import differing_tensors, recipe_of, run, write_records
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qlora.errors import BaseModelError
from qlora.exporters import ExportRequest
from qlora.exporters.export_run import export_run
from qlora.model import Model
from qlora.model.decoded_reader import DecodedReader
from qlora.model.load_base import Base, load
from qlora.model.open_checkpoint import open_checkpoint
from qlora.model.safetensors_reader import SafetensorsReader
from qlora.quant import Quant, build_quantizer
from qlora.quant.released.second_error import relative_error
from qlora.runs.load_run import load_run

UP = "model.layers.1.mlp.up_proj"
IDS = torch.arange(5, 37).unsqueeze(0)


@pytest.fixture(scope="module")
def released(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`released("gptq")`: the folder of a tiny bfloat16 Llama in a released format. Never write into it."""
    folder = tmp_path_factory.mktemp("released")

    def write(writer: str) -> Path:
        path = folder / writer
        return path if path.exists() else write_released(zoo("llama", dtype=torch.bfloat16), path, writer)

    return write


def loaded(folder: Path, kind: str = "nf4") -> Base:
    return load(Model(name=str(folder), dtype="float32"), build_quantizer(Quant(kind=kind)), torch.device("cpu"))


def logits(base: Base) -> Tensor:
    model: Any = base.model
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.sample(of=3)
@pytest.mark.parametrize("writer", WRITERS)
def test_the_frozen_model_is_that_of_the_decoded_checkpoint(
    released: Callable[[str], Path], zoo: Any, tmp_path: Path, writer: str
) -> None:
    folder = released(writer)
    decoded = write_decoded(folder, tmp_path / "decoded")
    reader, source = open_checkpoint(folder), SafetensorsReader(zoo("llama", dtype=torch.bfloat16))
    assert sorted(reader) == sorted(source)
    assert {reader.stored_format(key) for key in reader} == {None, WRITERS[writer][2]}
    assert all(reader.shape(key) == source.shape(key) and reader.is_float(key) for key in reader)
    assert all(reader.size_bytes(key) == reader[key].nbytes == source.size_bytes(key) for key in reader)
    frozen, other = loaded(folder), loaded(decoded)
    assert torch.equal(logits(frozen), logits(other))
    assert frozen.manifest.ignored == ()
    weight, original = reader[f"{UP}.weight"].float(), source[f"{UP}.weight"].float()
    assert float((weight - original).norm() / original.norm()) < 0.2  # what was written was decoded


def test_a_run_on_it_is_that_on_the_decoded_checkpoint_and_merges_to_one(
    released: Callable[[str], Path], tmp_path: Path
) -> None:
    records = write_records(tmp_path / "data.jsonl", 12)
    folders = {"released": released("gptq"), "decoded": write_decoded(released("gptq"), tmp_path / "decoded")}
    for name, folder in folders.items():
        run(recipe_of(folder, records, tmp_path / "runs" / name, "train.max_steps=3"))
    assert differing_tensors(*(tmp_path / "runs" / name for name in folders)) == []
    trained = load_run(str(tmp_path / "runs" / "released"))
    answer = export_run(trained, ExportRequest("merged", dtype="float32"), str(tmp_path / "merged"))
    assert answer["agreement"]["top1"] == 1.0
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == set(SafetensorsReader(folders["decoded"]))
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    merged = load_plain(tmp_path / "merged")(input_ids=IDS).logits
    torch.testing.assert_close(merged, logits(trained.base), rtol=0, atol=1e-4)


def test_a_stack_of_experts_is_read_one_at_a_time(tmp_path: Path) -> None:
    """gpt-oss: blocks and scales become the parameter of a 16-bit checkpoint, [experts, in, out]."""
    blocks, scales = torch.randint(0, 256, (3, 64, 2, 16)).to(torch.uint8), torch.randint(120, 130, (3, 64, 2))
    codes = torch.randn(3, 64, 64).to(FP8)
    tensors = {
        "e.gate_up_proj_blocks": blocks, "e.gate_up_proj_scales": scales.to(torch.uint8),
        "e.gate_up_proj_bias": torch.ones(3, 64), "e.down_proj": codes, "e.down_proj_scale_inv": torch.rand(3, 2, 2),
        "e.shared": codes.clone(), "e.shared_scale": torch.tensor(0.5),
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    reader = open_checkpoint(tmp_path).for_another_thread()
    assert list(reader) == ["e.down_proj", "e.gate_up_proj_bias", "e.gate_up_proj", "e.shared"] and len(reader) == 4
    assert isinstance(reader, DecodedReader) and reader.hidden == (
        "e.down_proj_scale_inv", "e.gate_up_proj_blocks", "e.gate_up_proj_scales", "e.shared_scale",
    )  # fmt: skip
    expected = convert_moe_packed_tensors(blocks, scales.to(torch.uint8))
    assert torch.equal(reader["e.gate_up_proj"], expected) and reader.shape("e.gate_up_proj") == (3, 64, 64)
    for key in ("e.gate_up_proj", "e.down_proj", "e.shared", "e.gate_up_proj_bias"):
        assert torch.equal(torch.stack([reader.part(key, expert) for expert in range(3)]), reader[key])
    assert torch.equal(reader["e.shared"], codes.bfloat16() / 2)
    assert "e.gate_up_proj_blocks" not in reader
    with pytest.raises(KeyError):
        reader["e.gate_up_proj_blocks"]
    for key in ("e.gate_up_proj", "e.gate_up_proj_bias"):
        with pytest.raises(BaseModelError, match=r"model\.safetensors: .*part 3|bounds"):
            reader.part(key, 3)


def test_the_second_error_is_that_of_the_stored_matrix() -> None:
    weight = torch.randn(300, 128).bfloat16()
    layer = build_quantizer(Quant()).quantize(weight)
    exact = (layer.weight(torch.bfloat16).float() - weight.float()).norm() / weight.float().norm()
    assert relative_error(weight, layer) == pytest.approx(float(exact), rel=1e-4)
    assert 0.05 < relative_error(weight, layer) < 0.15
    assert relative_error(torch.zeros_like(weight), layer) == 0.0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_reading_needs_memory_for_two_tensors(tmp_path: Path) -> None:
    """Of 6 matrices of 16 MiB, and for 32 MiB of mapped codes and those of one matrix."""
    tensors = {f"{index}.weight": torch.zeros(4096, 2048, dtype=torch.uint8).view(FP8) for index in range(6)}
    scales = {f"{key}_scale": torch.ones(4096, 1) for key in tensors}
    save_file(tensors | scales, tmp_path / "model.safetensors")
    del tensors
    reader = open_checkpoint(tmp_path)
    assert reader["0.weight"].count_nonzero() == 0  # fills the tables of codes

    def resident(line_start: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(line_start))

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    assert sum(reader[key].nbytes for key in reader) == 6 * 2**24
    assert resident("VmHWM") - before <= 2 * 2**24 + 2**25 + 2**23
