"""The merged model is the trained one, for every family, as transformers loads it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.small_runs import adapter_tensors, recipe_of, run, write_rows
from support.tiny_models import FAMILIES
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from qlora.adapters import peft_files
from qlora.adapters.inject import adapted
from qlora.errors import InputError, QloraError
from qlora.exporters import certificate
from qlora.exporters.adapter import Adapter
from qlora.exporters.export_run import ExportRequest, certify, export_run
from qlora.exporters.merged import MergedExporter
from qlora.model import safetensors_writer
from qlora.model.download import TOKENIZER_FILES
from qlora.model.safetensors_reader import Shards
from qlora.runs.load_run import LoadedRun, held_out, load_run

Zoo = Callable[..., Path]
IDS = torch.randint(5, 250, (3, 40), generator=torch.Generator().manual_seed(0))
ORDER = ExportRequest(to="merged", onto="dequantized", dtype="float32", data=None, rows=None)


def order(**changes: Any) -> ExportRequest:
    return ExportRequest(**(ORDER.__dict__ | changes))


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits.float()


def theirs(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


class Runs:
    """A finished run a family, its adapter far enough from zero to be seen: made once."""

    def __init__(self, zoo: Zoo, folder: Path) -> None:
        self.zoo, self.folder = zoo, folder
        self.data = write_rows(folder / "rows.jsonl", 12)

    def of(self, family: str, *overrides: str, **options: Any) -> Path:
        output = self.folder / "-".join([family, *(o.replace("=", "") for o in overrides), *map(str, options)])
        if not output.exists():
            shown = ("data.eval_fraction=0.25", "train.max_steps=2", "optim.learning_rate=0.02", *overrides)
            run(recipe_of(self.zoo(family, **options), self.data, output, *shown))
        return output


@pytest.fixture(scope="module")
def runs(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(zoo, tmp_path_factory.mktemp("export"))


@pytest.mark.xdist_group("export")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_is_the_trained_one(runs: Runs, family: str, tmp_path: Path) -> None:
    opened = load_run(str(runs.of(family)))
    answer = export_run(opened, ORDER, str(tmp_path / "merged"))
    ours, loaded = logits(opened.base.model), logits(theirs(tmp_path / "merged"))
    torch.testing.assert_close(loaded, ours, rtol=0, atol=1e-4)  # float32: W + s B A summed before or after the product
    assert torch.equal(loaded.argmax(-1), ours.argmax(-1))
    before = logits(theirs(runs.zoo(family)))
    assert (ours - before).abs().max() > 100 * (ours - loaded).abs().max()  # there was something to merge
    assert answer["agreement"]["top1"] == 1.0 and answer["agreement"]["max_logit_difference"] <= 1e-4
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    source = load_file(runs.zoo(family) / "model.safetensors")
    assert stored.keys() == source.keys() and all(stored[k].shape == source[k].shape for k in stored)
    assert answer["bytes"] == sum(value.numel() * value.itemsize for value in stored.values())


@pytest.mark.xdist_group("export")
@pytest.mark.parametrize("kind", ["fp4", "dense"])
@pytest.mark.parametrize("adapter", ["lora", "rslora", "dora"])
def test_other_stores_and_adapters_merge_as_well(runs: Runs, kind: str, adapter: str, tmp_path: Path) -> None:
    overrides = (f"quant.kind={kind}", f"adapter.kind={adapter}", "adapter.targets=[q_proj,down_proj]")
    opened = load_run(str(runs.of("llama-tied-bias", *overrides)))
    export_run(opened, order(rows=0), str(tmp_path / "merged"))
    torch.testing.assert_close(logits(theirs(tmp_path / "merged")), logits(opened.base.model), rtol=0, atol=1e-4)


@pytest.mark.xdist_group("export")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merged_weight_is_rounded_once(runs: Runs, dtype: str, tmp_path: Path) -> None:
    opened = load_run(str(runs.of("llama")))
    answer = export_run(opened, order(dtype=dtype), str(tmp_path / "merged"))
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    for path, layer in adapted(opened.base.model).items():
        exact = layer.base.weight(torch.float32) + layer.delta()
        assert torch.equal(stored[f"{path}.weight"], exact.to(getattr(torch, dtype)))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype == answer["dtype"]
    assert theirs(tmp_path / "merged", getattr(torch, dtype)).dtype == getattr(torch, dtype)


@pytest.mark.xdist_group("export")
def test_a_run_in_bfloat16_is_merged_onto_what_it_computed_with(runs: Runs, tmp_path: Path) -> None:
    opened = load_run(str(runs.of("llama", "model.dtype=bfloat16")))
    assert export_run(opened, order(dtype=None), str(tmp_path / "own"))["dtype"] == "bfloat16"
    export_run(opened, ORDER, str(tmp_path / "merged"))
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    for path, layer in adapted(opened.base.model).items():
        assert torch.equal(stored[f"{path}.weight"], layer.base.weight(torch.float32) + layer.delta())
    embedding = opened.base.model.get_input_embeddings().weight
    assert torch.equal(stored["model.embed_tokens.weight"], embedding.float())


@pytest.mark.xdist_group("export")
def test_onto_the_original_it_is_the_16_bit_weight_and_the_update(runs: Runs, tmp_path: Path) -> None:
    opened = load_run(str(runs.of("llama-tied-bias", dtype=torch.bfloat16)))
    export_run(opened, order(onto="original", rows=4), str(tmp_path / "merged"))
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    source = load_file(opened.base.folder.path / "model.safetensors")
    deltas = {f"{path}.weight": layer.delta() for path, layer in adapted(opened.base.model).items()}
    for name, value in source.items():
        assert torch.equal(stored[name], value.float() + deltas[name] if name in deltas else value.float()), name
    assert deltas.keys() < source.keys()


@pytest.mark.xdist_group("export")
def test_layers_without_an_adapter_are_those_that_were_trained_with(runs: Runs, tmp_path: Path) -> None:
    """Frozen layers that have no adapter were quantised all the same; onto the original they are not."""
    opened = load_run(str(runs.of("llama", "adapter.targets=[q_proj]")))
    export_run(opened, order(rows=0), str(tmp_path / "merged"))
    export_run(opened, order(rows=0, onto="original"), str(tmp_path / "original"))
    name = "model.layers.0.mlp.up_proj"
    frozen = opened.base.model.get_submodule(name).weight(torch.float32)
    source = load_file(opened.base.folder.path / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"], frozen)
    assert torch.equal(load_file(tmp_path / "original" / "model.safetensors")[f"{name}.weight"], source)
    assert not torch.equal(frozen, source)


# ---- the folder


@pytest.mark.xdist_group("export")
def test_the_folder_is_a_plain_model_with_the_bases_own_tokenizer(runs: Runs, tmp_path: Path) -> None:
    opened = load_run(str(runs.of("llama-tied-bias")))
    export_run(opened, ORDER, str(tmp_path / "merged"))
    base, merged = opened.base.folder.path, tmp_path / "merged"
    copied = [name for name in (*TOKENIZER_FILES, "generation_config.json") if (base / name).is_file()]
    assert len(copied) >= 3
    for name in copied:
        assert (merged / name).read_bytes() == (base / name).read_bytes(), name
    config = json.loads((merged / "config.json").read_text())
    ours = json.loads((base / "config.json").read_text())
    assert "quantization_config" not in config and config == ours | {"dtype": "float32"}
    assert "lm_head.weight" not in load_file(merged / "model.safetensors")
    assert not list(merged.glob("adapter*"))


@pytest.mark.xdist_group("export")
def test_a_head_that_is_stored_beside_its_embedding_is_written_once(runs: Runs, zoo: Zoo, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    opened = load_run(str(runs.of("llama-tied-bias")))
    twice = Path(shutil.copytree(opened.base.folder.path, tmp_path / "twice"))
    tensors = load_file(twice / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, twice / "model.safetensors", metadata={"format": "pt"})
    moved = Path(shutil.copytree(runs.of("llama-tied-bias"), tmp_path / "run"))
    text = (moved / "recipe.yaml").read_text().replace(str(opened.base.folder.path), str(twice))
    (moved / "recipe.yaml").write_text(text)
    export_run(load_run(str(moved)), ORDER, str(tmp_path / "merged"))
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")


@pytest.mark.xdist_group("export")
@pytest.mark.parametrize("shard_bytes", [1, 20_000, 60_000])
def test_shards_are_read_back_as_one_model(
    runs: Runs, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = load_run(str(runs.of("llama")))
    write = safetensors_writer.write_model
    monkeypatch.setattr(
        "qlora.exporters.merged.write_model",
        lambda folder, tensors, report, notes: write(folder, tensors, shard_bytes, report, notes),
    )
    size = export_run(opened, order(rows=0), str(tmp_path / "merged"))["bytes"]
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 3 and {file.name for file in files} == set(index["weight_map"].values())
    read = Shards(tmp_path / "merged")
    assert index["metadata"]["total_size"] == size == sum(read[key].nbytes for key in index["weight_map"])
    largest = max(value.nbytes for value in load_file(runs.zoo("llama") / "model.safetensors").values())
    assert all(sum(v.nbytes for v in load_file(file).values()) <= max(shard_bytes, largest) for file in files)
    torch.testing.assert_close(logits(theirs(tmp_path / "merged")), logits(opened.base.model), rtol=0, atol=1e-4)


@pytest.mark.xdist_group("export")
def test_the_adapter_target_is_the_folder_that_peft_reads(runs: Runs, tmp_path: Path) -> None:
    source = runs.of("llama")
    export_run(load_run(str(source)), order(to="adapter"), str(tmp_path / "adapter"))
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {peft_files.WEIGHTS, peft_files.CONFIG, "tokenizer.json"} <= files
    for name in files:
        assert (tmp_path / "adapter" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.xdist_group("export")
def test_a_checkpoint_is_exported_as_it_was_then(runs: Runs, tmp_path: Path) -> None:
    source = runs.of("llama", "train.save_every=1")
    export_run(load_run(str(source / "checkpoint-000001")), order(rows=0), str(tmp_path / "merged"))
    opened = load_run(str(source / "checkpoint-000001"))
    torch.testing.assert_close(logits(theirs(tmp_path / "merged")), logits(opened.base.model), rtol=0, atol=1e-4)
    first, last = adapter_tensors(source / "checkpoint-000001"), adapter_tensors(source)
    assert any(not torch.equal(first[name], last[name]) for name in first)


# ---- the certificate


@pytest.mark.xdist_group("export")
@pytest.mark.parametrize(
    ("dtype", "onto"), [("float32", "dequantized"), ("bfloat16", "dequantized"), ("float32", "original")]
)
def test_the_certificate_says_what_an_independent_measurement_says(
    runs: Runs, dtype: str, onto: str, tmp_path: Path
) -> None:
    opened = load_run(str(runs.of("gemma2")))
    answer = export_run(opened, order(dtype=dtype, onto=onto), str(tmp_path / "merged"))["agreement"]
    rows = held_out(opened, None)
    loaded = theirs(tmp_path / "merged", getattr(torch, dtype))
    kl, same, tokens, largest = 0.0, 0, 0, 0.0
    for row in rows:
        ids = torch.as_tensor(row.input_ids, dtype=torch.long)[None]
        p, q = (F.softmax(logits(model, ids)[0].double(), -1) for model in (opened.base.model, loaded))
        kl += float((p * (p.log() - q.log())).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        largest = max(largest, float((logits(opened.base.model, ids) - logits(loaded, ids)).abs().max()))
        tokens += ids.numel()
    assert answer["rows"] == len(rows) == 3 and answer["tokens"] == tokens
    assert answer["top1"] == same / tokens
    assert answer["mean_kl"] == pytest.approx(kl / tokens, rel=1e-3, abs=1e-7)  # abs: float32 sums of nearly nothing
    assert answer["max_logit_difference"] == pytest.approx(largest, rel=1e-3, abs=1e-6)
    written = json.loads((tmp_path / "merged" / "certificate.json").read_text())
    assert {key: written[key] for key in answer} == answer
    if onto == "original":
        assert answer["mean_kl"] > 1e-3  # the error of quantising comes back, and the certificate says so


@pytest.mark.xdist_group("export")
def test_a_wrong_merge_does_not_get_a_good_certificate(runs: Runs, tmp_path: Path) -> None:
    opened = load_run(str(runs.of("llama")))
    export_run(opened, order(rows=0), str(tmp_path / "merged"))
    base_only = certificate.compare(
        opened.base.model, theirs(runs.zoo("llama")), held_out(opened, None), torch.device("cpu")
    )
    assert base_only.top1 < 0.99 and base_only.mean_kl > 1e-3
    assert certify(opened, tmp_path / "merged", order(rows=2)).rows == 2


# ---- what is refused, and what is left then


@pytest.mark.xdist_group("export")
def test_an_existing_folder_is_never_touched(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("there", "file"):
        with pytest.raises(InputError, match="already"):
            export_run(load_run(str(runs.of("llama"))), ORDER, str(tmp_path / name))
    assert (tmp_path / "there" / "precious.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.xdist_group("export")
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), QloraError("no")])
@pytest.mark.parametrize("place", ["write_model", "certify"])
def test_nothing_half_written_is_where_the_export_should_be(
    runs: Runs, place: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = load_run(str(runs.of("llama")))
    if place == "certify":
        monkeypatch.setattr("qlora.exporters.export_run.certify", lambda *arguments: raise_(error))
    else:
        shard = safetensors_writer._write_shard

        def broken(path: Path, tensors: Any, progress: Any) -> Any:
            for number, tensor in enumerate(shard(path, tensors, progress)):
                if number == 5:
                    raise error
                yield tensor

        monkeypatch.setattr(safetensors_writer, "_write_shard", broken)
    with pytest.raises(QloraError if isinstance(error, OSError) else type(error)):
        export_run(opened, ORDER, str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
    monkeypatch.undo()
    export_run(opened, ORDER, str(tmp_path / "merged"))
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def raise_(error: BaseException) -> Any:
    raise error


def test_both_targets_are_in_the_table() -> None:
    from qlora.exporters import TARGETS

    assert TARGETS["merged"] is MergedExporter and TARGETS["adapter"] is Adapter


@pytest.mark.xdist_group("export")
def test_the_base_is_the_same_bytes_after_all_of_it(runs: Runs, zoo: Zoo, tmp_path: Path) -> None:
    folder = zoo("qwen3")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    opened: LoadedRun = load_run(str(runs.of("qwen3")))
    export_run(opened, ORDER, str(tmp_path / "merged"))
    export_run(opened, order(to="adapter"), str(tmp_path / "adapter"))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
