"""`qlora export --to gguf` and `--to gguf-adapter` of runs: certificate, folded scales, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.adapters.peft_config import module_settings
from qlora.errors import AdapterError, InputError, QloraError
from qlora.exporters import MAX_KL, ExportRequest
from qlora.exporters.export_run import build_source, export_run
from qlora.exporters.export_source import ExportOptions
from qlora.exporters.gguf.gguf_adapter import GgufAdapterExporter, check_adapter_file, places_of_pairs
from qlora.exporters.gguf.gguf_architectures import architecture_of
from qlora.exporters.gguf.gguf_file import GgufFile
from qlora.exporters.gguf.tensor_layout import placements_by_source
from qlora.runs.load_run import LoadedRun, load_run


@pytest.fixture(scope="module")
def llama(runs: Any) -> LoadedRun:
    return load_run(str(runs.train("llama")))


def test_a_file_of_a_run_is_certified_as_written(llama: LoadedRun, tmp_path: Path) -> None:
    lines: list[str] = []
    answer = export_run(llama, ExportRequest("gguf"), str(tmp_path / "out"), lines.append)
    assert answer["dtype"] == "float16"
    assert answer["agreement"]["mean_kl"] < 1e-5
    assert answer["conversations"]["compared"] == answer["conversations"]["equal"] > 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "certificate.json", "README.md"}
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["mean_kl"] == answer["agreement"]["mean_kl"]
    file = GgufFile(tmp_path / "out" / "model.gguf")
    assert file.get("general.name") == Path(llama.recipe.model.name).name
    assert file.get("tokenizer.ggml.eos_token_id") in llama.base.stop_token_ids
    assert "<|im_start|>" in file.get("tokenizer.chat_template")


def test_an_adapter_file_holds_the_updates_with_their_scale(llama: LoadedRun, tmp_path: Path) -> None:
    source = build_source(llama)
    rslora = replace(source.adapter, config={**source.adapter.config, "use_rslora": True})
    source = replace(source, adapter=rslora)
    GgufAdapterExporter().write(source, tmp_path, ExportOptions("dequantized", torch.float32))
    file, path = GgufFile(tmp_path / "adapter.gguf"), "model.layers.0.self_attn.v_proj"
    assert file.get("adapter.lora.alpha") == 4.0  # the rank: the scale is in B
    a, b = (file.values(f"blk.0.attn_v.weight.lora_{side}") for side in "ab")
    own_a, own_b = (side.float() for side in rslora.pairs[path])
    torch.testing.assert_close(b @ a, 8 / 4**0.5 * own_b @ own_a, rtol=1e-5, atol=1e-7)
    places = places_of_pairs(architecture_of(llama.base.model), llama.base.model, rslora.pairs)
    with pytest.raises(QloraError, match="is not the update of"):  # without the scale
        check_adapter_file(file, places, rslora.pairs)


def test_matrices_of_other_ranks_keep_their_updates(llama: LoadedRun, tmp_path: Path) -> None:
    source, path = build_source(llama), "model.layers.1.self_attn.q_proj"
    a, b = source.adapter.pairs[path]
    mixed = replace(source.adapter, pairs={**source.adapter.pairs, path: (a[:2], b[:, :2])})
    GgufAdapterExporter().write(replace(source, adapter=mixed), tmp_path, ExportOptions("dequantized", torch.float32))
    file, place = GgufFile(tmp_path / "adapter.gguf"), placements_by_source(architecture_of(source.model), source.model)
    written_a, written_b = (file.values(f"blk.1.attn_q.weight.lora_{side}") for side in "ab")
    scale = file.get("adapter.lora.alpha") / len(written_a)  # llama.cpp's, by the rank of the matrix
    actual = scale * place[f"{path}.weight"][0].undo(written_b) @ written_a
    expected = module_settings(mixed.config, path, 2).scaling * b[:, :2].float() @ a[:2].float()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_what_is_no_plain_lora_is_refused_with_the_way_out(llama: LoadedRun, tmp_path: Path) -> None:
    source = build_source(llama)
    dora = replace(source.adapter, magnitudes={path: torch.ones(1) for path in source.adapter.pairs})
    with pytest.raises(AdapterError, match="--to merged"):
        GgufAdapterExporter().write(
            replace(source, adapter=dora), tmp_path, ExportOptions("dequantized", torch.float32)
        )
    assert not (tmp_path / "adapter.gguf").exists()


def test_few_bits_and_the_original_base_have_no_default_limit() -> None:
    assert ExportRequest("gguf").kl_limit == ExportRequest("merged").kl_limit == MAX_KL
    assert ExportRequest("gguf", dtype="q4_0").kl_limit is None
    assert ExportRequest("merged", base="original").kl_limit is None
    assert ExportRequest("gguf", dtype="q4_0", max_kl=0.2).kl_limit == 0.2


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for request, reason in (
        (ExportRequest("merged", dtype="q8_0"), "no 'q8_0' for --to merged"),
        (ExportRequest("gguf", dtype="q4_k_m"), "no 'q4_k_m' for --to gguf"),
        (ExportRequest("merged", llama_cpp=str(tmp_path)), "--llama-cpp: it is for --to gguf"),
        (ExportRequest("gguf", llama_cpp=str(tmp_path)), r"has no convert_hf_to_gguf\.py"),
    ):
        with pytest.raises(InputError, match=reason):
            request.check(tmp_path / "out")
    (tmp_path / "convert_hf_to_gguf.py").write_text("")
    with pytest.raises(InputError, match="has no llama-quantize"):
        ExportRequest("gguf", dtype="q4_k_m", llama_cpp=str(tmp_path)).check(tmp_path / "out")


def test_a_checkout_writes_the_file_and_a_failure_has_its_words(llama: LoadedRun, tmp_path: Path) -> None:
    request = ExportRequest("gguf", llama_cpp=str(tmp_path), rows=2)
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import sys\nsys.exit('this architecture is not supported')\n")
    with pytest.raises(QloraError, match=r"exit code 1\): this architecture is not supported"):
        export_run(llama, request, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    written = tmp_path / "native"
    export_run(llama, replace(request, llama_cpp=None, rows=0), str(written))
    script.write_text(
        f"import shutil, sys\nshutil.copy({str(written / 'model.gguf')!r}, sys.argv[sys.argv.index('--outfile') + 1])\n"
    )
    answer = export_run(llama, request, str(tmp_path / "out"))
    assert answer["agreement"]["mean_kl"] < 1e-5
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "certificate.json", "README.md"}
