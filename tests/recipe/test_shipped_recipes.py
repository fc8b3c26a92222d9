"""Every recipe that comes along passes `qlora check` on a small base in its place; as it is, only files are missing."""

import json
from pathlib import Path

import pytest
from support.command_line import qlora
from support.documents import ROOT

BASE, ROWS = ROOT / "qlora" / "demo" / "base", ROOT / "qlora" / "demo" / "data" / "eval.jsonl"


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_passes_check_with_a_base_and_rows_that_are_here(file: Path) -> None:
    held = [f"data.eval={ROWS}", "data.format=auto"] if file.stem.startswith("guanaco") else []
    found = qlora("check", file, f"model.name={BASE}", f"data.train={ROWS}", *held, "--json")
    assert found.code == 0, found.out + found.err
    assert found.json["ok"] and found.json["memory"]["fits"] and found.json["data"]["kept"] > 0


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_without_a_network_only_the_model_and_the_data_are_missing(file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = json.loads(qlora("check", file, "--json").out)
    assert {problem["where"] for problem in found["problems"]} <= {"model"}, found["problems"]
