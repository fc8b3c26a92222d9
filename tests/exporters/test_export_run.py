"""An export: its certificate equals an independent measurement, and a failed one leaves nothing behind."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapted_models import load_plain, logits
from torch.nn import functional as F

from qlora.adapters import peft_files
from qlora.errors import InputError, QloraError
from qlora.exporters import TARGETS, ExportRequest, certificate
from qlora.exporters.adapter import AdapterExporter
from qlora.exporters.export_run import export_run
from qlora.exporters.measure import certify
from qlora.exporters.merged import MergedExporter
from qlora.model import safetensors_writer
from qlora.runs.load_run import held_out_examples, load_run

Zoo = Callable[..., Path]
MERGED = ExportRequest("merged", dtype="float32")


def test_exporters_are_in_the_table() -> None:
    assert TARGETS["merged"] is MergedExporter and TARGETS["adapter"] is AdapterExporter


def test_an_exported_adapter_is_the_folder_that_peft_reads(runs: Any, tmp_path: Path) -> None:
    source = runs.train("llama")
    export_run(load_run(str(source)), ExportRequest("adapter"), str(tmp_path / "adapter"))
    names = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {peft_files.WEIGHTS, peft_files.CONFIG, "tokenizer.json"} <= names
    changed = {"tokenizer_config.json", "README.md"}  # in more words, and with other commands
    for name in (names & {file.name for file in source.iterdir()}) - changed:
        assert (tmp_path / "adapter" / name).read_bytes() == (source / name).read_bytes()


def test_an_option_without_effect_on_an_adapter_is_named(runs: Any, tmp_path: Path) -> None:
    lines: list[str] = []
    request = ExportRequest("adapter", base="original", dtype="float16", rows=0)
    result = export_run(load_run(str(runs.train("llama"))), request, str(tmp_path / "adapter"), lines.append)
    assert [line for line in lines if "has no effect" in line] == [
        f"careful: {option} has no effect for --to adapter, which writes the adapter's float32 matrices"
        for option in ("--dtype", "--base")
    ]
    assert result["dtype"] == "float32"


def test_the_base_is_unchanged_by_exports(runs: Any, zoo: Zoo, tmp_path: Path) -> None:
    folder = zoo("qwen3")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    loaded = load_run(str(runs.train("qwen3")))
    export_run(loaded, MERGED, str(tmp_path / "merged"))
    export_run(loaded, ExportRequest("adapter"), str(tmp_path / "adapter"))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


# ---- the certificate


@pytest.mark.sample(of=2)
@pytest.mark.parametrize(
    ("dtype", "base"), [("float32", "dequantized"), ("bfloat16", "dequantized"), ("float32", "original")]
)
def test_the_certificate_equals_an_independent_measurement(runs: Any, dtype: str, base: str, tmp_path: Path) -> None:
    loaded = load_run(str(runs.train("gemma2")))
    request = replace(MERGED, dtype=dtype, base=base)
    agreement = export_run(loaded, request, str(tmp_path / "merged"))["agreement"]
    examples, trained = held_out_examples(loaded, None), loaded.base.model
    written = load_plain(tmp_path / "merged", getattr(torch, dtype))
    kl, same, tokens, largest = 0.0, 0, 0, 0.0
    for example in examples:
        ids = torch.as_tensor(example.input_ids, dtype=torch.long)[None]
        trained_logits, written_logits = (logits(model, ids)[0].float() for model in (trained, written))
        p, q = (F.softmax(values.double(), -1) for values in (trained_logits, written_logits))
        kl += float((p * (p.log() - q.log())).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        largest = max(largest, float((trained_logits - written_logits).abs().max()))
        tokens += ids.numel()
    assert agreement["rows"] == len(examples) == 3 and agreement["tokens"] == tokens
    assert agreement["top1"] == same / tokens
    assert agreement["mean_kl"] == pytest.approx(kl / tokens, rel=1e-3, abs=1e-7)  # abs: float32 sums close to zero
    assert agreement["max_logit_difference"] == pytest.approx(largest, rel=1e-3, abs=1e-6)
    content = json.loads((tmp_path / "merged" / "certificate.json").read_text())
    assert {key: content[key] for key in agreement} == agreement
    if base == "original":
        assert agreement["mean_kl"] > 1e-3  # training saw the quantization error, which is missing here


def test_a_wrong_merge_does_not_get_a_good_certificate(runs: Any, tmp_path: Path) -> None:
    loaded = load_run(str(runs.train("llama")))
    export_run(loaded, replace(MERGED, rows=0), str(tmp_path / "merged"))
    examples, without_update = held_out_examples(loaded, None), load_plain(runs.zoo("llama"))
    agreement = certificate.compare(loaded.base.model, without_update, examples, torch.device("cpu"))
    assert agreement.top1 < 0.99 and agreement.mean_kl > 1e-3
    assert certify(loaded, tmp_path / "merged", replace(MERGED, rows=2)).rows == 2


# ---- failures


def test_an_existing_folder_is_never_changed(runs: Any, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("folder", "file"):
        with pytest.raises(InputError, match="already"):
            export_run(load_run(str(runs.train("llama"))), MERGED, str(tmp_path / name))
    assert (tmp_path / "folder" / "precious.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.sample(of=3, every=("step",))
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), QloraError("no")])
@pytest.mark.parametrize("step", ["write_model", "certify"])
def test_a_failed_export_leaves_no_folder_and_can_be_repeated(
    runs: Any, step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_run(str(runs.train("llama")))
    fsync, syncs = os.fsync, count(1)

    def fail(*arguments: Any) -> Any:
        raise error

    if step == "certify":
        monkeypatch.setattr("qlora.exporters.measure.certify", fail)
    else:  # after a few tensors
        monkeypatch.setattr(safetensors_writer, "SYNC_BYTES", 1)
        monkeypatch.setattr(os, "fsync", lambda descriptor: fsync(descriptor) if next(syncs) < 15 else fail())
    with pytest.raises(QloraError if isinstance(error, OSError) else type(error)):
        export_run(loaded, MERGED, str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
    monkeypatch.undo()
    export_run(loaded, MERGED, str(tmp_path / "merged"))
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
