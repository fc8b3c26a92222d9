"""A DoRA adapter as the nearest LoRA: its reported error is that of an SVD of the exact update."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import qlora
from support.small_runs import recipe_of, run, write_records

from qlora.adapters import peft_files
from qlora.adapters.inject import adapted
from qlora.adapters.plain_lora import fold_scaling
from qlora.runs.load_run import load_run

Zoo = Callable[..., Path]


@pytest.fixture(scope="module")
def dora(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dora")
    data = write_records(folder / "records.jsonl", 12)
    options = ("adapter.kind=dora", "train.max_steps=2", "optim.learning_rate=0.02", "data.eval_fraction=0.25")
    run(recipe_of(zoo("llama-tied-bias"), data, folder / "run", *options))
    return folder / "run"


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("requested", [None, 2, 24, 64])
def test_the_reported_error_is_that_of_an_svd(dora: Path, requested: int | None, tmp_path: Path) -> None:
    options = ("--rank", requested) if requested else ()
    result = qlora("export", dora, tmp_path / "out", "--to", "portable", *options, "--json")
    rank = requested or 4
    pairs, missing, total = fold_scaling(peft_files.read(tmp_path / "out")), 0.0, 0.0
    for path, layer in adapted(load_run(str(dora)).base.model).items():
        delta = layer.delta().double()
        a, b = pairs[path]
        distance = float((delta - b.double() @ a.double()).norm())
        best = float(torch.linalg.svdvals(delta)[rank:].norm())
        assert distance <= 1.02 * best + 1e-5 * float(delta.norm())  # subspace iteration comes within 2 % of the best
        missing, total = missing + distance**2, total + float(delta.norm()) ** 2
    shortened, agreement = result.json["shortened"], result.json["agreement"]
    assert shortened["error"] == pytest.approx((missing / total) ** 0.5, rel=0.1, abs=1e-3)
    assert (shortened["error"] < 1e-3) == (rank == 64) and shortened["rank"] == rank  # 64: as many as matrices have
    assert f"nearest LoRA of rank {rank}" in result.err and f"{shortened['error']:.2%}" in result.err
    assert agreement["top1"] > 0.5 and agreement["rows"] == 3
    if rank == 64:
        assert agreement["max_logit_difference"] < 1e-3
    config = json.loads((tmp_path / "out" / peft_files.CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == rank and not config["use_dora"]
    assert f"nearest LoRA of rank {rank}" in (tmp_path / "out" / "README.md").read_text()
    assert "vllm serve" in result.err


def test_a_higher_rank_is_nearer_and_max_kl_is_a_limit(dora: Path, tmp_path: Path) -> None:
    def export_at(rank: int) -> Any:
        return qlora("export", dora, tmp_path / f"r{rank}", "--to", "portable", "--rank", rank, "--json").json

    exports = [export_at(rank) for rank in (2, 16)]
    errors = [answer["shortened"]["error"] for answer in exports]
    assert errors[0] > errors[1]
    assert exports[0]["agreement"]["mean_kl"] > exports[1]["agreement"]["mean_kl"]
    refused = qlora("export", dora, tmp_path / "out", "--to", "portable", "--rank", 2, "--max-kl", 1e-9)
    assert refused.code == 1 and "--rank" in refused.err and not (tmp_path / "out").exists()


def test_a_rank_is_refused_where_nothing_is_approximated(dora: Path, zoo: Zoo, tmp_path: Path) -> None:
    refused = qlora("export", dora, tmp_path / "out", "--to", "merged", "--rank", 4)
    assert refused.code == 2 and "--rank" in refused.err
    data = write_records(tmp_path / "records.jsonl", 8)
    run(recipe_of(zoo("llama"), data, tmp_path / "run", "train.max_steps=1"))
    refused = qlora("export", tmp_path / "run", tmp_path / "out", "--to", "portable", "--rank", 4)
    assert refused.code == 2 and "qlora resize" in refused.err and not (tmp_path / "out").exists()


@pytest.mark.sample(of=4)
@pytest.mark.parametrize(("init", "kind"), [("pissa", "nf4"), ("loftq", "nf4"), ("pissa", "dense"), ("default", "nf4")])
def test_an_adapter_with_quantization_error_warns_about_it(zoo: Zoo, init: str, kind: str, tmp_path: Path) -> None:
    data = write_records(tmp_path / "records.jsonl", 8)
    options = ("train.max_steps=1", f"adapter.init={init}", f"quant.kind={kind}")
    run(recipe_of(zoo("llama"), data, tmp_path / "run", *options))
    result = qlora("export", tmp_path / "run", tmp_path / "out", "--to", "portable")
    texts = [result.err, *((tmp_path / name / "README.md").read_text() for name in ("run", "out"))]
    assert all(("counts twice" in text) == (kind == "nf4" and init != "default") for text in texts)
