"""Every shipped recipe passes `qlora check` with a small base model; unchanged, only the model and data are missing."""

import json
from pathlib import Path

import pytest
from support.command_line import qlora
from support.documents import ROOT
from support.preferences import write_answers

from qlora.training.objectives import OBJECTIVES

BASE, RECORDS = ROOT / "qlora" / "demo" / "base", ROOT / "qlora" / "demo" / "data" / "eval.jsonl"


@pytest.mark.sample(of=8)
@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_passes_check_with_a_local_model_and_local_data(file: Path, tmp_path: Path) -> None:
    kind = file.stem.rpartition("-")[2]
    data = write_answers(kind, tmp_path / "answers.jsonl") if kind in OBJECTIVES else RECORDS
    eval_data = [f"data.eval={RECORDS}", "data.format=auto"] if file.stem.startswith("guanaco") else []
    result = qlora("check", file, f"model.name={BASE}", f"data.train={data}", *eval_data, "--json")
    assert result.code == 0, result.out + result.err
    assert result.json["ok"] and result.json["memory"]["fits"] and result.json["data"]["kept"] > 0


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_without_a_network_only_the_model_and_the_data_are_missing(file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = json.loads(qlora("check", file, "--json").out)
    keys = {problem["message"].split(":")[0] for problem in result["problems"]}
    assert {"model", "model.name"} & keys and keys <= {"model", "model.name", "data.train", "data.eval"}, result[
        "problems"
    ]
    assert all(problem["where"].startswith(f"{file}:") for problem in result["problems"])
