"""A DoRA adapter as the nearest LoRA: its error is what an SVD of the true difference says, and users are told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import qlora
from support.small_runs import recipe_of, run, write_rows

from qlora.adapters import peft_files
from qlora.adapters.inject import adapted
from qlora.adapters.plain_lora import folded
from qlora.runs.load_run import load_run

Zoo = Callable[..., Path]
pytestmark = pytest.mark.xdist_group("nearest")


@pytest.fixture(scope="module")
def dora(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dora")
    data = write_rows(folder / "rows.jsonl", 12)
    shown = ("adapter.kind=dora", "train.max_steps=4", "optim.learning_rate=0.02", "data.eval_fraction=0.25")
    run(recipe_of(zoo("llama-tied-bias"), data, folder / "run", *shown))
    return folder / "run"


@pytest.mark.parametrize("rank", [None, 2, 24, 64])
def test_the_stated_error_is_that_of_an_svd(dora: Path, rank: int | None, tmp_path: Path) -> None:
    words = ("--rank", rank) if rank else ()
    found = qlora("export", dora, tmp_path / "out", "--to", "portable", *words, "--json")
    rank = rank or 4
    written, missing, whole = folded(peft_files.read(tmp_path / "out")), 0.0, 0.0
    for path, layer in adapted(load_run(str(dora)).base.model).items():
        delta = layer.delta().double()
        a, b = written[path]
        distance = float((delta - b.double() @ a.double()).norm())
        best = float(torch.linalg.svdvals(delta)[rank:].norm())
        assert distance <= 1.02 * best + 1e-5 * float(delta.norm())  # subspace iteration comes within 2 % of the best
        missing, whole = missing + distance**2, whole + float(delta.norm()) ** 2
    said = found.json["shortened"]
    assert said["error"] == pytest.approx((missing / whole) ** 0.5, rel=0.1, abs=1e-3)
    assert (said["error"] < 1e-3) == (rank == 64) and said["rank"] == rank  # no matrix here has more directions
    assert f"nearest LoRA of rank {rank}" in found.err and f"{said['error']:.2%}" in found.err
    assert found.json["agreement"]["top1"] > 0.5 and found.json["agreement"]["rows"] == 3
    if rank == 64:
        assert found.json["agreement"]["max_logit_difference"] < 1e-3
    config = json.loads((tmp_path / "out" / peft_files.CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == rank and not config["use_dora"]
    assert f"nearest LoRA of rank {rank}" in (tmp_path / "out" / "README.md").read_text()
    assert "vllm serve" in found.err


def test_more_rank_is_nearer_and_a_limit_is_kept(dora: Path, tmp_path: Path) -> None:
    def at(rank: int) -> Any:
        return qlora("export", dora, tmp_path / f"r{rank}", "--to", "portable", "--rank", rank, "--json").json

    errors = [at(rank) for rank in (2, 8, 32)]
    assert errors[0]["shortened"]["error"] > errors[1]["shortened"]["error"] > errors[2]["shortened"]["error"]
    assert errors[0]["agreement"]["mean_kl"] > errors[2]["agreement"]["mean_kl"]
    said = qlora("export", dora, tmp_path / "out", "--to", "portable", "--rank", 2, "--max-kl", 1e-9)
    assert said.code == 1 and "--rank" in said.err and not (tmp_path / "out").exists()


def test_a_rank_is_only_for_what_is_approximated(dora: Path, zoo: Zoo, tmp_path: Path) -> None:
    said = qlora("export", dora, tmp_path / "out", "--to", "merged", "--rank", 4)
    assert said.code == 2 and "--rank" in said.err
    data = write_rows(tmp_path / "rows.jsonl", 8)
    run(recipe_of(zoo("llama"), data, tmp_path / "run", "train.max_steps=1"))
    said = qlora("export", tmp_path / "run", tmp_path / "out", "--to", "portable", "--rank", 4)
    assert said.code == 2 and "qlora resize" in said.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("init", "kind"), [("pissa", "nf4"), ("loftq", "nf4"), ("pissa", "dense"), ("default", "nf4")])
def test_an_adapter_that_holds_the_quantisation_error_says_so(zoo: Zoo, init: str, kind: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 8)
    run(
        recipe_of(
            zoo("llama"), data, tmp_path / "run", "train.max_steps=1", f"adapter.init={init}", f"quant.kind={kind}"
        )
    )
    found = qlora("export", tmp_path / "run", tmp_path / "out", "--to", "portable")
    told = [found.err, (tmp_path / "run" / "README.md").read_text(), (tmp_path / "out" / "README.md").read_text()]
    assert all(("counts twice" in text) == (kind == "nf4" and init != "default") for text in told)
