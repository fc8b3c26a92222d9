"""`qlora init`: for any GPU and data it writes a recipe that is valid, fits, and has a comment on every line."""

import io
import json
import os
import pty
import re
import select
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from support.child_processes import Child, Notify
from support.command_line import qlora
from support.documents import ROOT
from support.small_runs import write_records

from qlora.cli.app import run as run_cli
from qlora.recipe.literature import holds, rank_that_holds
from qlora.recipe.planning import Machine, Planner
from qlora.recipe.recipe import read
from qlora.training.schedule import count_steps

DEMO = ROOT / "qlora" / "demo"
RECORDS = {
    "messages": {"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Two."}]},
    "alpaca": {"instruction": "Say one.", "input": "", "output": "One."},
    "completion": {"prompt": "One?", "completion": "Two."},
    "text": {"text": "One and two are three."},
}


def suggested(folder: Path, data: Path, *options: str) -> Path:
    """The recipe that init writes for the demo's base model."""
    out = folder / "my recipe.yaml"
    result = qlora("init", "--model", DEMO / "base", "--data", data, "-o", out, *(options or ("--gpu", "8GiB")))
    assert result.code == 0, result.err
    assert result.out == "" and "Next: qlora check" in result.err
    return out


@pytest.mark.parametrize("kind", RECORDS)
def test_the_format_is_detected_and_the_recipe_reads_without_a_note(kind: str, tmp_path: Path) -> None:
    data = tmp_path / "rows # with: signs.jsonl"
    data.write_text("".join(json.dumps(RECORDS[kind]) + "\n" for _ in range(8)))
    recipe, notes = read(suggested(tmp_path, data))
    assert recipe.data.format == kind and notes == []
    assert recipe.data.train[0].path == str(data)


def test_every_setting_has_a_comment(tmp_path: Path) -> None:
    text = suggested(tmp_path, write_records(tmp_path / "records.jsonl", 40)).read_text()
    lines = text.splitlines()
    for above, line in pairwise(lines):
        if re.match(r"  \w+: ", line):
            assert "  # " in line or above.startswith("  # "), line


def test_the_recipe_fits_the_gpu_and_trains_without_changes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = suggested(tmp_path, write_records(tmp_path / "records.jsonl", 12), "--gpu", "2GiB")
    recipe, _ = read(out)
    assert Planner(recipe).plan(Machine.described("2GiB", 1, None)).fits
    assert qlora("check", out).code == 0
    result = qlora("train", out, "train.epochs=1", "model.dtype=float32")  # bfloat16 is slow on a CPU
    assert result.code == 0, result.err
    assert (tmp_path / "runs" / "my recipe" / "run.json").is_file()


def test_a_smaller_gpu_gets_fewer_tokens_and_too_small_is_exit_code_3(tmp_path: Path) -> None:
    data = tmp_path / "records.jsonl"
    data.write_text("".join(json.dumps({"text": f"{number} " + "word " * 400}) + "\n" for number in range(200)))
    sizes = []
    for gpu in ("80GiB", "0.62GiB", "0.59GiB"):
        folder = tmp_path / gpu
        folder.mkdir()
        recipe, _ = read(suggested(folder, data, "--gpu", gpu, "--ram", "1GiB"))
        assert Planner(recipe).plan(Machine.described(gpu, 1, "1GiB")).fits
        sizes.append(recipe.data.max_length * recipe.train.micro_batch)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    result = qlora("init", "--model", DEMO / "base", "--data", data, "--gpu", "100MiB", "-o", tmp_path / "no.yaml")
    assert result.code == 3 and result.err.count("\n") == 1 and not (tmp_path / "no.yaml").exists()


def test_max_length_is_at_most_the_context_of_the_model(tmp_path: Path) -> None:
    data = tmp_path / "records.jsonl"
    data.write_text(json.dumps({"text": "word " * 3000}) + "\n" + json.dumps({"text": "word " * 30}) + "\n")
    assert read(suggested(tmp_path, data))[0].data.max_length <= 512


def test_few_records_still_give_some_steps(tmp_path: Path) -> None:
    recipe, _ = read(suggested(tmp_path, DEMO / "data" / "train.jsonl"))
    assert count_steps(recipe.train, 300) >= 100


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    out = suggested(tmp_path, write_records(tmp_path / "records.jsonl", 8))
    before = out.read_bytes()
    result = qlora("init", "--model", DEMO / "base", "--data", tmp_path / "records.jsonl", "-o", out)
    assert result.code == 2 and "never overwritten" in result.err and out.read_bytes() == before


def test_without_a_terminal_the_missing_option_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    result = qlora("init", "--gpu", "8GiB")
    assert result.code == 2 and "--model" in result.err


def test_at_a_terminal_it_asks(tmp_path: Path) -> None:
    records = write_records(tmp_path / "records.jsonl", 12)
    master, slave = pty.openpty()

    def init(notify: Notify) -> int:
        for handle in (0, 1, 2):
            os.dup2(slave, handle)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(handle, "r" if handle == 0 else "w") for handle in (0, 1, 2))
        return run_cli(["init", "-o", str(tmp_path / "asked.yaml")])

    child = Child(init, tmp_path / "log")
    os.close(slave)
    output = ""
    for question, answer in (
        ("Base model", str(DEMO / "base")),
        ("Your data", str(records)),
        ("Memory of your", "8GiB"),
    ):
        output += _read_until(master, question)
        os.write(master, f"{answer}\n".encode())
    assert child.wait() == 0, output
    os.close(master)
    assert read(tmp_path / "asked.yaml")[0].model.name == str(DEMO / "base")


def _read_until(handle: int, words: str) -> str:
    text, deadline = "", time.monotonic() + 60
    while words not in text and time.monotonic() < deadline:
        if select.select([handle], [], [], 1)[0]:
            text += os.read(handle, 4096).decode(errors="replace")
    assert words in text
    return text


def test_init_for_a_hub_model_downloads_no_weights(tmp_path: Path, monkeypatch) -> None:
    patterns: list[str] = []

    def download(name: str, *, allow_patterns: list[str], **_: object) -> str:
        patterns.extend(allow_patterns)
        return str(DEMO / "base")

    monkeypatch.setattr("qlora.model.download.snapshot_download", download)
    data = write_records(tmp_path / "records.jsonl", 8)
    result = qlora("init", "--model", "some/model", "--data", data, "--gpu", "8GiB", "-o", tmp_path / "my.yaml")
    assert result.code == 0 and qlora("preview", tmp_path / "my.yaml").code == 0
    assert "tokenizer.json" in patterns and not [name for name in patterns if "safetensors" in name]


def test_the_proposed_rank_is_the_lowest_that_holds_the_tokens() -> None:
    rank = rank_that_holds(4, 10_240, 37_181)
    assert rank == 8 and holds(10_240 * rank // 4, 37_181) and not holds(10_240 * (rank - 1) // 4, 37_181)
