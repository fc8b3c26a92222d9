"""Limits of a merge: a killed one resumes; one that loses the update, or is not the trained model, is refused."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import qlora
from support.small_runs import recipe_of, run, write_records

from qlora.adapters.inject import adapted
from qlora.errors import QloraError
from qlora.exporters import ExportRequest
from qlora.exporters.certificate import summarize_rounding
from qlora.exporters.export_run import export_run
from qlora.model import safetensors_writer
from qlora.runs.load_run import load_run
from qlora.utils.atomic_files import sha256_manifest

Zoo = Callable[..., Path]
REQUEST = ExportRequest("merged", dtype="bfloat16", rows=2)


@pytest.fixture(scope="module")
def train(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """A run whose updates are as large as its learning rate makes them, trained once."""
    runs: dict[float, Path] = {}

    def run_of(rate: float) -> Path:
        if rate not in runs:
            folder = tmp_path_factory.mktemp("run")
            data = write_records(folder / "records.jsonl", 8)
            options = ("train.max_steps=2", f"optim.learning_rate={rate}", "data.eval_fraction=0.25")
            run(recipe_of(zoo("llama"), data, folder / "run", *options))
            runs[rate] = folder / "run"
        return runs[rate]

    return run_of


class Killed(BaseException):
    """Simulates SIGKILL: no handler of the product catches it."""


@contextmanager
def count_syncs(killed_at: int | None = None) -> Iterator[list[int]]:
    """Inside the block every sync of a model file to the disk is counted in the list; number `killed_at` is a kill."""
    syncs, fsync = [0], os.fsync

    def count(descriptor: int) -> None:
        syncs[0] += os.readlink(f"/proc/self/fd/{descriptor}").endswith(".safetensors")
        if syncs[0] == killed_at:
            raise Killed
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", count)
        yield syncs


@pytest.mark.sample(of=3)
@pytest.mark.parametrize(("shard_bytes", "sync_bytes"), [(10**9, 1), (60_000, 40_000), (10**9, 10**9)])
def test_a_killed_merge_resumes_and_writes_the_same_bytes(
    train: Any, sync_bytes: int, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_run(str(train(0.02)))
    monkeypatch.setattr(safetensors_writer, "SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(safetensors_writer, "SYNC_BYTES", sync_bytes)
    with count_syncs() as all_syncs:
        expected = export_run(loaded, REQUEST, str(tmp_path / "uninterrupted"))
    for number in (1, min(9, *all_syncs)):
        with count_syncs(killed_at=number), pytest.raises(Killed):
            export_run(loaded, REQUEST, str(tmp_path / "out"))
        assert not (tmp_path / "out").exists() and (tmp_path / ".partial-out").exists()
        with max((tmp_path / ".partial-out").glob("*.safetensors")).open("ab") as file:
            file.write(b"half a tensor")
    servers = json.loads(json.dumps(expected["servers"]).replace("uninterrupted", "out"))
    with count_syncs() as syncs:
        resumed = export_run(loaded, REQUEST, str(tmp_path / "out"))
    assert resumed == expected | {"path": str(tmp_path / "out"), "servers": servers}
    assert sha256_manifest(tmp_path / "out") == sha256_manifest(tmp_path / "uninterrupted")
    if sync_bytes == 1:
        assert syncs[0] == all_syncs[0] - 8  # the tensors synced before the kill are not written again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "uninterrupted"]


def test_another_request_does_not_resume_a_killed_one(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_run(str(train(0.02)))
    monkeypatch.setattr(safetensors_writer, "SYNC_BYTES", 1)
    with count_syncs(killed_at=6), pytest.raises(Killed):
        export_run(loaded, REQUEST, str(tmp_path / "out"))
    for name in ("out", "fresh"):
        export_run(loaded, replace(REQUEST, dtype="float32"), str(tmp_path / name))
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "fresh"))
    assert first == second


# ---- rounding


@pytest.mark.sample(of=6, every=("rate", "dtype"))
@pytest.mark.parametrize("rate", [0.02, 1e-3, 1e-4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_reported_rounding_error_is_the_true_one(train: Any, rate: float, dtype: str, tmp_path: Path) -> None:
    loaded = load_run(str(train(rate)))
    rounding = export_run(loaded, replace(REQUEST, dtype=dtype, max_lost=99.0), str(tmp_path / "out"))["rounding"]
    error, size, lossy = 0.0, 0.0, {}
    for path, layer in adapted(loaded.base.model).items():
        exact = layer.base.weight(torch.float32) + layer.delta()
        layer_error = (exact.to(getattr(torch, dtype)).double() - exact.double()).norm()
        layer_size = layer.delta().double().norm()
        error, size = error + float(layer_error**2), size + float(layer_size**2)
        if layer_error > 0.5 * layer_size:
            lossy[path] = float(layer_error / layer_size)
    assert rounding["lost"] == pytest.approx((error / size) ** 0.5, rel=1e-3, abs=1e-7)
    assert rounding["drowned"] == pytest.approx(lossy, rel=1e-3)
    if dtype == "float32":
        assert rounding == {"lost": 0.0, "drowned": {}}
    if (rate, dtype) == (1e-4, "bfloat16"):
        assert len(lossy) == 14  # a small update in 8 bits of mantissa


def test_an_update_lost_in_rounding_is_exported_only_with_max_lost(train: Any, tmp_path: Path) -> None:
    arguments = ("export", train(1e-4), tmp_path / "out", "--to", "merged", "--dtype")
    refused = qlora(*arguments, "bfloat16", "--json")
    assert refused.code == 1 and refused.out == "" and not (tmp_path / "out").exists()
    assert "14 layers lose more than 50% of their update" in refused.err
    assert "self_attn" in refused.err and "--max-lost" in refused.err
    exported = qlora(*arguments, "bfloat16", "--json", "--max-lost", 100).json
    assert exported["rounding"]["lost"] > 1 and (tmp_path / "out" / "config.json").is_file()
    assert qlora("export", train(1e-4), tmp_path / "float16", *arguments[3:], "float16").code == 0


def test_a_merge_that_differs_from_the_trained_model_is_refused(train: Any, tmp_path: Path) -> None:
    loaded, original = load_run(str(train(0.02))), replace(REQUEST, base="original")
    with pytest.raises(QloraError, match="mean KL") as caught:
        export_run(loaded, replace(original, max_kl=1e-9), str(tmp_path / "out"))
    assert caught.value.exit_code == 1 and not (tmp_path / "out").exists()
    agreement = export_run(loaded, original, str(tmp_path / "out"))["agreement"]
    assert agreement["mean_kl"] > 1e-9  # on the original base the KL is reported, but there is no default limit
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["limits"] == {"max_kl": None, "max_lost": 1.0} and certificate["rounding"]["drowned"] == {}


def test_the_losses_are_those_of_eval(train: Any, tmp_path: Path) -> None:
    source = train(0.02)
    arguments = ("export", source, tmp_path / "out", "--to", "merged", "--dtype", "float32", "--json")
    agreement, loss = qlora(*arguments).json["agreement"], qlora("eval", source, "--json").json["loss"]
    assert agreement["trained_loss"] == pytest.approx(loss, rel=1e-5)
    assert agreement["written_loss"] == pytest.approx(loss, abs=1e-4)


def test_untrained_layers_do_not_count_in_the_rounding_error() -> None:
    layers = {
        "a": {"error": 1.0, "update": 0.0}, "b": {"error": 0.3, "update": 0.4}, "c": {"error": 0.0, "update": 0.3}
    }  # fmt: skip
    rounding = summarize_rounding(layers)
    assert rounding.lossy_layers == pytest.approx({"b": 0.75}) and rounding.relative_error == pytest.approx(0.6)
    assert summarize_rounding({}).relative_error == 0 and "b 75%" in str(rounding)
