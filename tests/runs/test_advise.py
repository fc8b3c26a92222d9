"""`qlora advise`: its counts, its losses equal those of `qlora eval`, and every reason has a number."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.command_line import qlora
from support.documents import ROOT

from qlora.data.types import IGNORED, Example
from qlora.recipe.recipe import read
from qlora.runs.advise.after import as_lines
from qlora.runs.advise.before import append_to_shots, count_contradictions
from qlora.runs.advise.verdict import FEW_RECORDS, KNOWN_LOSS, PROMPTED, UNSEEN, VERDICTS, judge

pytestmark = pytest.mark.xdist_group("advise")
BASE = ROOT / "qlora" / "demo" / "base"
LINES = (ROOT / "qlora" / "demo" / "data" / "train.jsonl").read_text().splitlines()


def write_recipe(folder: Path, train: list[str], held_out: list[str]) -> Path:
    """A recipe of the demo's base model with these records."""
    for name, lines in (("train", train), ("held_out", held_out)):
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {{name: {BASE}, dtype: float32}}\nadapter: {{rank: 4}}\noptim: {{kind: adamw, learning_rate: 5e-3}}\n"
        f"data: {{train: {folder}/train.jsonl, eval: {folder}/held_out.jsonl, max_length: 200, packing: false}}\n"
        f"train: {{output: {folder}/run, max_steps: 12, micro_batch: 8, global_batch: 8, log_every: 3}}\n"
    )
    read(path)
    return path


def record(question: str, answer: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages})


def test_duplicates_and_contradictions_are_counted(tmp_path: Path) -> None:
    more = [record("What is it?", "A stool."), record("What is it?", "A lamp."), record("What is it?", "A lamp.")]
    path = write_recipe(tmp_path, [*LINES[:20], *LINES[:3], *more], LINES[30:40])
    result = qlora("advise", path, "--rows", 0, "--json").json
    assert result["data"]["duplicates"] == 4  # three of the first lines, and the lamp
    assert result["data"]["contradictions"] == 1 and result["data"]["kept"] == 26
    assert result["few_shot"] is None
    printed = qlora("advise", path, "--rows", 0)
    assert printed.code == 0 and printed.out == "" and result["reasons"]
    assert all(reason["text"] in printed.err for reason in result["reasons"])


@pytest.mark.parametrize(("copied", "share"), [(0, 0.0), (5, 0.5), (10, 1.0)])
def test_held_out_records_that_are_in_the_training_set_are_near(copied: int, share: float, tmp_path: Path) -> None:
    held_out = [*LINES[:copied], *LINES[500 : 510 - copied]]
    result = qlora("advise", write_recipe(tmp_path, LINES[:60], held_out), "--rows", 0, "--json").json
    assert result["novelty"]["near"] == pytest.approx(share)


def test_unseen_words_are_in_no_prompt_and_no_training_answer(tmp_path: Path) -> None:
    train = [record(f"Who bought the {thing}?", f"Somebody bought {thing}.") for thing in ("stool", "lamp", "ring")]
    known = [record("Who bought the kettle?", "Somebody bought kettle.")]
    novel = [record("Who bought the kettle?", "Archibald Featherstonehaugh, Llanfairpwllgwyngyll")]
    (tmp_path / "a").mkdir()
    result = qlora("advise", write_recipe(tmp_path / "a", train, known), "--rows", 0, "--json").json
    assert result["novelty"]["unseen_words"] == 0
    result = qlora("advise", write_recipe(tmp_path, train, novel), "--rows", 0, "--json").json
    assert result["novelty"]["unseen_words"] == 1 and result["verdict"] == "retrieve"


def test_only_the_tokens_of_the_example_after_the_shots_are_scored() -> None:
    ids = np.arange(5, dtype=np.int32)
    example = Example("a:1", ids, np.where(ids < 2, IGNORED, ids).astype(np.int32))
    prompted = append_to_shots([example, example], example)
    assert prompted.input_ids.tolist() == [*range(5)] * 3 and prompted.boundaries == ()
    assert prompted.labels.tolist() == [IGNORED] * 10 + example.labels.tolist()
    assert prompted.trained_tokens() == example.trained_tokens()
    assert count_contradictions([example, example]) == 0


def test_the_losses_of_the_base_model_are_those_of_eval(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, LINES[:60], LINES[200:204])
    result = qlora("advise", path, "--rows", 4, "--json").json
    shot = result["few_shot"]
    measured = qlora("eval", BASE, "--data", tmp_path / "held_out.jsonl", "--json").json
    # `eval` of a model computes in its bfloat16, the recipe in float32.
    assert shot["rows"] == 4 and shot["loss"] == pytest.approx(measured["loss"], rel=0.02)
    assert shot["shots"] >= 2 and shot["few_shot_loss"] < shot["loss"]  # the base model copies from its context


def figures_with(**changes: float) -> dict:
    values = {"kept": 500, "unseen_words": 0.0, "loss": 2.0, "few_shot_loss": 1.9, "trained_tokens": 1000} | changes
    data = {
        "duplicates": 0,
        "contradictions": values.get("contradictions", 0),
        "rows": values["kept"],
        "kept": values["kept"],
        "trained_tokens": values["trained_tokens"],
        "largest_adapter_parameters": 1000,
    }
    shot = {"rows": 9, "shots": 4, "loss": values["loss"], "few_shot_loss": values["few_shot_loss"]}
    return {"data": data, "novelty": {"near": 0.0, "unseen_words": values["unseen_words"]}, "few_shot": shot}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "lora"),
        ({"loss": KNOWN_LOSS / 2, "few_shot_loss": KNOWN_LOSS / 2}, "prompt"),
        ({"unseen_words": UNSEEN + 0.1}, "retrieve"),
        ({"kept": FEW_RECORDS - 1, "few_shot_loss": 2 * (1 - PROMPTED) - 0.1}, "prompt"),
        ({"kept": FEW_RECORDS - 1}, "lora"),
        ({"trained_tokens": 2001}, "full"),
        ({"contradictions": 101}, "clean"),
    ],
)
def test_each_verdict_follows_from_its_threshold(changes: dict, verdict: str) -> None:
    result, reasons = judge(figures_with(**changes))
    assert result == verdict and verdict in VERDICTS
    assert all(reason.source and any(sign.isdigit() for sign in reason.text) for reason in reasons)


@pytest.mark.slow
def test_a_task_that_the_base_model_can_do_needs_a_prompt_only(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, LINES[:900], LINES[900:930])
    assert qlora("train", path, "train.max_steps=90", "adapter.rank=16", "train.micro_batch=16",
                 "train.global_batch=16").code == 0  # fmt: skip
    assert qlora("export", tmp_path / "run", tmp_path / "merged", "--to", "merged", "--rows", 0).code == 0
    result = qlora("advise", path, f"model.name={tmp_path / 'merged'}", "--rows", 16, "--json").json
    assert result["verdict"] == "prompt" and result["few_shot"]["loss"] < KNOWN_LOSS


def test_after_a_run_the_figures_are_those_of_eval_and_inspect(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, LINES[:40], LINES[200:204])
    assert qlora("train", path, "train.max_steps=6").code == 0
    result = qlora("advise", tmp_path / "run", "--json").json
    measured = qlora("eval", tmp_path / "run", "--beside-base", "--json").json
    rank = qlora("inspect", tmp_path / "run", "--json").json
    assert result["learnt"]["loss"] == measured["loss"] and result["learnt"]["base_loss"] == measured["base"]["loss"]
    assert result["forgot"]["loss"] == measured["forgetting"]["loss"]
    assert result["rank"] == {key: rank[key] for key in ("verdict", "suggested_rank", "reason")}
    assert result["learnt"]["train_loss"] < result["learnt"]["base_loss"]
    reasons = [reason["text"] for reason in result["reasons"]]
    text = "\n".join(reasons)
    assert "it learned: held-out loss" in text and "general text" in text and "rank" in text
    assert [line.startswith(f"- {reason}") for line, reason in zip(as_lines(result), reasons, strict=True)]


@pytest.mark.parametrize(
    "arguments", [("nowhere.yaml",), (".",), ("recipe.yaml", "data.eval=null", "data.eval_fraction=0")]
)
def test_a_wrong_subject_is_one_line_and_exit_code_2(arguments: tuple, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, LINES[:5], LINES[5:7])
    result = qlora("advise", *arguments, "--rows", 0)
    assert result.code == 2 and result.out == "" and result.err.count("\n") == 1, result.err
