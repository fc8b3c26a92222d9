"""The merged model is the trained one, for every family, as transformers loads it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapted_models import load_plain
from support.adapted_models import logits as logits_of
from support.small_runs import adapter_tensors
from support.tiny_models import FAMILIES
from torch import Tensor

from qlora.adapters.inject import adapted
from qlora.exporters import ExportRequest
from qlora.exporters.export_run import export_run
from qlora.model import safetensors_writer
from qlora.model.download import TOKENIZER_FILES
from qlora.model.safetensors_reader import SafetensorsReader
from qlora.runs.load_run import load_run

Zoo = Callable[..., Path]
IDS = torch.randint(5, 250, (3, 40), generator=torch.Generator().manual_seed(0))
MERGED = ExportRequest("merged", dtype="float32")
UNCERTIFIED = replace(MERGED, rows=0)


def logits(model: Any) -> Tensor:
    return logits_of(model, IDS).float()


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_is_the_trained_one(runs: Any, family: str, tmp_path: Path) -> None:
    loaded = load_run(str(runs.train(family)))
    answer = export_run(loaded, MERGED, str(tmp_path / "merged"))
    trained, merged = logits(loaded.base.model), logits(load_plain(tmp_path / "merged"))
    torch.testing.assert_close(merged, trained, rtol=0, atol=1e-4)  # float32: W + s B A summed before or after x
    assert torch.equal(merged.argmax(-1), trained.argmax(-1))
    before = logits(load_plain(runs.zoo(family)))
    assert (trained - before).abs().max() > 100 * (trained - merged).abs().max()  # the update is not negligible
    assert answer["agreement"]["top1"] == 1.0 and answer["agreement"]["max_logit_difference"] <= 1e-4
    written = load_file(tmp_path / "merged" / "model.safetensors")
    source = load_file(runs.zoo(family) / "model.safetensors")
    assert written.keys() == source.keys() and all(written[k].shape == source[k].shape for k in written)
    assert answer["bytes"] == sum(value.numel() * value.itemsize for value in written.values())


@pytest.mark.sample(of=6, every=("kind", "adapter"))
@pytest.mark.parametrize("kind", ["fp4", "dense"])
@pytest.mark.parametrize("adapter", ["lora", "rslora", "dora"])
def test_every_quantizer_and_adapter_can_be_merged(runs: Any, kind: str, adapter: str, tmp_path: Path) -> None:
    overrides = (f"quant.kind={kind}", f"adapter.kind={adapter}", "adapter.targets=[q_proj,down_proj]")
    loaded = load_run(str(runs.train("llama-tied-bias", *overrides)))
    export_run(loaded, UNCERTIFIED, str(tmp_path / "merged"))
    merged = load_plain(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(loaded.base.model), rtol=0, atol=1e-4)


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merged_weight_is_rounded_once(runs: Any, dtype: str, tmp_path: Path) -> None:
    loaded, torch_dtype = load_run(str(runs.train("llama"))), getattr(torch, dtype)
    answer = export_run(loaded, replace(MERGED, dtype=dtype), str(tmp_path / "merged"))
    written = load_file(tmp_path / "merged" / "model.safetensors")
    for path, layer in adapted(loaded.base.model).items():
        exact = layer.base.weight(torch.float32) + layer.delta()
        assert torch.equal(written[f"{path}.weight"], exact.to(torch_dtype))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype == answer["dtype"]
    assert load_plain(tmp_path / "merged", torch_dtype).dtype == torch_dtype


def test_a_bfloat16_run_is_merged_with_its_compute_dtypes_weights(runs: Any, tmp_path: Path) -> None:
    loaded = load_run(str(runs.train("llama", "model.dtype=bfloat16")))
    assert export_run(loaded, replace(MERGED, dtype=None), str(tmp_path / "default"))["dtype"] == "bfloat16"
    export_run(loaded, MERGED, str(tmp_path / "merged"))
    written = load_file(tmp_path / "merged" / "model.safetensors")
    for path, layer in adapted(loaded.base.model).items():
        assert torch.equal(written[f"{path}.weight"], layer.base.weight(torch.float32) + layer.delta())
    embedding = loaded.base.model.get_input_embeddings().weight
    assert torch.equal(written["model.embed_tokens.weight"], embedding.float())


def test_on_the_original_base_it_is_the_16_bit_weight_plus_the_update(runs: Any, tmp_path: Path) -> None:
    loaded = load_run(str(runs.train("llama-tied-bias", dtype=torch.bfloat16)))
    export_run(loaded, replace(MERGED, base="original", rows=4), str(tmp_path / "merged"))
    written = load_file(tmp_path / "merged" / "model.safetensors")
    source = load_file(loaded.base.folder.path / "model.safetensors")
    deltas = {f"{path}.weight": layer.delta() for path, layer in adapted(loaded.base.model).items()}
    for name, value in source.items():
        assert torch.equal(written[name], value.float() + deltas[name] if name in deltas else value.float()), name
    assert deltas.keys() < source.keys()


def test_frozen_layers_without_an_adapter_are_dequantized(runs: Any, tmp_path: Path) -> None:
    """They were quantized in training; on the original base they are copied."""
    loaded = load_run(str(runs.train("llama", "adapter.targets=[q_proj]")))
    export_run(loaded, UNCERTIFIED, str(tmp_path / "merged"))
    export_run(loaded, replace(UNCERTIFIED, base="original"), str(tmp_path / "original"))
    name = "model.layers.0.mlp.up_proj"
    frozen = loaded.base.model.get_submodule(name).weight(torch.float32)
    source = load_file(loaded.base.folder.path / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"], frozen)
    assert torch.equal(load_file(tmp_path / "original" / "model.safetensors")[f"{name}.weight"], source)
    assert not torch.equal(frozen, source)


def test_the_folder_is_a_plain_model_with_the_bases_tokenizer(runs: Any, tmp_path: Path) -> None:
    loaded = load_run(str(runs.train("llama-tied-bias")))
    export_run(loaded, MERGED, str(tmp_path / "merged"))
    base, merged = loaded.base.folder.path, tmp_path / "merged"
    copied = [name for name in TOKENIZER_FILES if (base / name).is_file()]
    assert len(copied) >= 2
    for name in (name for name in copied if name != "tokenizer_config.json"):  # test_served_files.py
        assert (merged / name).read_bytes() == (base / name).read_bytes(), name
    generation = {name: json.loads((folder / "generation_config.json").read_text()) for name, folder in (
        ("base", base), ("merged", merged)
    )}  # fmt: skip
    ends = {
        "eos_token_id": list(loaded.base.stop_token_ids)
    }  # of the tokenizer too, and as the template closes answers
    assert generation["merged"] == {k: v for k, v in generation["base"].items() if k != "_from_model_config"} | ends
    config, base_config = (json.loads((folder / "config.json").read_text()) for folder in (merged, base))
    assert "quantization_config" not in config and config.items() >= (base_config | {"dtype": "float32"}).items()
    assert "lm_head.weight" not in load_file(merged / "model.safetensors")
    assert not list(merged.glob("adapter*"))


def test_a_tied_head_that_the_base_stores_twice_is_written_once(runs: Any, tmp_path: Path) -> None:
    base = load_run(str(runs.train("llama-tied-bias"))).base.folder.path
    with_head = Path(shutil.copytree(base, tmp_path / "with_head"))
    tensors = load_file(with_head / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, with_head / "model.safetensors", metadata={"format": "pt"})
    copy = Path(shutil.copytree(runs.train("llama-tied-bias"), tmp_path / "run"))
    (copy / "recipe.yaml").write_text((copy / "recipe.yaml").read_text().replace(str(base), str(with_head)))
    export_run(load_run(str(copy)), MERGED, str(tmp_path / "merged"))
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")


@pytest.mark.sample(of=3)
@pytest.mark.parametrize("shard_bytes", [1, 20_000, 60_000])
def test_shards_are_read_back_as_one_model(
    runs: Any, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_run(str(runs.train("llama")))
    write = safetensors_writer.write_model
    monkeypatch.setattr(
        "qlora.exporters.merged.write_model",
        lambda folder, tensors, **options: write(folder, tensors, shard_bytes, **options),
    )
    size = export_run(loaded, UNCERTIFIED, str(tmp_path / "merged"))["bytes"]
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 3 and {file.name for file in files} == set(index["weight_map"].values())
    reader = SafetensorsReader(tmp_path / "merged")
    assert index["metadata"]["total_size"] == size == sum(reader[key].nbytes for key in index["weight_map"])
    largest = max(value.nbytes for value in load_file(runs.zoo("llama") / "model.safetensors").values())
    assert all(sum(v.nbytes for v in load_file(file).values()) <= max(shard_bytes, largest) for file in files)
    merged = load_plain(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(loaded.base.model), rtol=0, atol=1e-4)


def test_a_checkpoint_is_exported_with_its_own_weights(runs: Any, tmp_path: Path) -> None:
    source = runs.train("llama", "train.save_every=1")
    loaded = load_run(str(source / "checkpoint-000001"))
    export_run(loaded, UNCERTIFIED, str(tmp_path / "merged"))
    merged = load_plain(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(loaded.base.model), rtol=0, atol=1e-4)
    first, last = adapter_tensors(source / "checkpoint-000001"), adapter_tensors(source)
    assert any(not torch.equal(first[name], last[name]) for name in first)
