"""`qlora init`: whatever the card and the data, what it writes is a recipe that reads, fits and is explained."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from support.command_line import qlora
from support.documents import ROOT
from support.small_runs import write_rows

from qlora.recipe.planning import elsewhere, plan_of
from qlora.recipe.recipe import read
from qlora.training.loop import steps_of

DEMO = ROOT / "qlora" / "demo"
ROWS = {
    "messages": {"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Two."}]},
    "alpaca": {"instruction": "Say one.", "input": "", "output": "One."},
    "completion": {"prompt": "One?", "completion": "Two."},
    "text": {"text": "One and two are three."},
}


def begun(folder: Path, data: Path, *more: str) -> Path:
    """The recipe that init writes for the demo's base."""
    out = folder / "my recipe.yaml"
    said = qlora("init", "--model", DEMO / "base", "--data", data, "-o", out, *(more or ("--gpu", "8GiB")))
    assert said.code == 0, said.err
    assert said.out == "" and "Next: qlora check" in said.err
    return out


@pytest.mark.parametrize("kind", ROWS)
def test_the_format_is_found_and_the_recipe_reads_without_a_note(kind: str, tmp_path: Path) -> None:
    data = tmp_path / "rows # with: signs.jsonl"
    data.write_text("".join(json.dumps(ROWS[kind]) + "\n" for _ in range(8)))
    recipe, notes = read(begun(tmp_path, data))
    assert recipe.data.format == kind and notes == []
    assert recipe.data.train[0].path == str(data)


def test_every_line_is_explained(tmp_path: Path) -> None:
    text = begun(tmp_path, write_rows(tmp_path / "rows.jsonl", 40)).read_text()
    lines = text.splitlines()
    for above, line in pairwise(lines):
        if re.match(r"  \w+: ", line):
            assert "  # " in line or above.startswith("  # "), line


def test_what_it_writes_fits_the_card_and_is_trained_as_it_stands(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = begun(tmp_path, write_rows(tmp_path / "rows.jsonl", 24), "--gpu", "2GiB")
    recipe, _ = read(out)
    assert plan_of(recipe, elsewhere("2GiB", 1, None)).fits
    assert qlora("check", out).code == 0
    said = qlora("train", out, "train.epochs=1")
    assert said.code == 0, said.err
    assert (tmp_path / "runs" / "my recipe" / "run.json").is_file()


def test_a_smaller_card_gets_shorter_rows_or_fewer_at_a_time_and_none_gets_exit_code_3(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"{number} " + "word " * 400}) + "\n" for number in range(200)))
    sizes = []
    for gpu in ("80GiB", "0.62GiB", "0.59GiB"):
        folder = tmp_path / gpu
        folder.mkdir()
        recipe, _ = read(begun(folder, data, "--gpu", gpu, "--ram", "1GiB"))
        assert plan_of(recipe, elsewhere(gpu, 1, "1GiB")).fits
        sizes.append(recipe.data.max_length * recipe.train.micro_batch)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    said = qlora("init", "--model", DEMO / "base", "--data", data, "--gpu", "100MiB", "-o", tmp_path / "no.yaml")
    assert said.code == 3 and said.err.count("\n") == 1 and not (tmp_path / "no.yaml").exists()


def test_no_row_is_longer_than_the_model_can_see(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"text": "word " * 3000}) + "\n" + json.dumps({"text": "word " * 30}) + "\n")
    assert read(begun(tmp_path, data))[0].data.max_length <= 512


def test_few_rows_still_make_a_run_of_some_steps(tmp_path: Path) -> None:
    recipe, _ = read(begun(tmp_path, DEMO / "data" / "train.jsonl"))
    assert steps_of(recipe.train, 300) >= 100


def test_a_file_that_is_there_is_never_overwritten(tmp_path: Path) -> None:
    out = begun(tmp_path, write_rows(tmp_path / "rows.jsonl", 8))
    before = out.read_bytes()
    said = qlora("init", "--model", DEMO / "base", "--data", tmp_path / "rows.jsonl", "-o", out)
    assert said.code == 2 and "never overwritten" in said.err and out.read_bytes() == before


def test_without_a_terminal_what_is_missing_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    said = qlora("init", "--gpu", "8GiB")
    assert said.code == 2 and "--model" in said.err


def test_at_a_terminal_it_asks(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "qlora", "init", "-o", "asked.yaml"],
        stdin=slave, stdout=slave, stderr=slave, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.close(slave)
    seen = ""
    for question, answer in (("Base model", str(DEMO / "base")), ("Your rows", str(rows)), ("Memory of your", "8GiB")):
        seen += _read_until(master, question)
        os.write(master, f"{answer}\n".encode())
    assert child.wait(60) == 0, seen
    os.close(master)
    assert read(tmp_path / "asked.yaml")[0].model.name == str(DEMO / "base")


def _read_until(handle: int, words: str) -> str:
    found, until = "", time.monotonic() + 60
    while words not in found and time.monotonic() < until:
        if select.select([handle], [], [], 1)[0]:
            found += os.read(handle, 4096).decode(errors="replace")
    assert words in found
    return found


def test_looking_at_a_model_of_the_hub_fetches_no_weight(tmp_path: Path, monkeypatch) -> None:
    asked: list[str] = []

    def fetched(name: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.extend(allow_patterns)
        return str(DEMO / "base")

    monkeypatch.setattr("qlora.model.download.snapshot_download", fetched)
    data = write_rows(tmp_path / "rows.jsonl", 8)
    said = qlora("init", "--model", "some/model", "--data", data, "--gpu", "8GiB", "-o", tmp_path / "my.yaml")
    assert said.code == 0 and qlora("preview", tmp_path / "my.yaml").code == 0
    assert "tokenizer.json" in asked and not [name for name in asked if "safetensors" in name]
