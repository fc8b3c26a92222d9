"""`qlora advise`: what it counts is there, what it scores is what eval scores, and every judgement has its number."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.command_line import qlora
from support.documents import ROOT

from qlora.data.types import IGNORED, Example
from qlora.recipe.recipe import read
from qlora.runs.advise.before import behind, contradictions
from qlora.runs.advise.verdict import FEW_ROWS, KNOWN_LOSS, PROMPTED, UNSEEN, VERDICTS, judge

pytestmark = pytest.mark.xdist_group("advise")
BASE = ROOT / "qlora" / "demo" / "base"
LINES = (ROOT / "qlora" / "demo" / "data" / "train.jsonl").read_text().splitlines()


def recipe_with(folder: Path, train: list[str], held: list[str], **settings: str) -> Path:
    """A recipe of the demo's base over these lines."""
    for name, lines in (("train", train), ("held", held)):
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {{name: {BASE}, dtype: float32}}\nadapter: {{rank: 4}}\noptim: {{kind: adamw, learning_rate: 5e-3}}\n"
        f"data: {{train: {folder}/train.jsonl, eval: {folder}/held.jsonl, max_length: 200, packing: false}}\n"
        f"train: {{output: {folder}/run, max_steps: 30, micro_batch: 8, global_batch: 8, log_every: 5}}\n"
    )
    read(path)
    return path


def row(asked: str, answer: str) -> str:
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


def test_repeated_and_contradicting_rows_are_counted(tmp_path: Path) -> None:
    more = [row("What is it?", "A stool."), row("What is it?", "A lamp."), row("What is it?", "A lamp.")]
    path = recipe_with(tmp_path, [*LINES[:20], *LINES[:3], *more], LINES[30:40])
    found = qlora("advise", path, "--rows", 0, "--json").json
    assert found["data"]["duplicates"] == 4  # three of the first lines, and the lamp
    assert found["data"]["contradictions"] == 1 and found["data"]["kept"] == 26
    assert found["few_shot"] is None


@pytest.mark.parametrize(("copied", "share"), [(0, 0.0), (5, 0.5), (10, 1.0)])
def test_held_out_rows_that_stand_in_the_training_set_are_near_ones(copied: int, share: float, tmp_path: Path) -> None:
    held = [*LINES[:copied], *LINES[500 : 510 - copied]]
    found = qlora("advise", recipe_with(tmp_path, LINES[:60], held), "--rows", 0, "--json").json
    assert found["novelty"]["near"] == pytest.approx(share)


def test_words_that_no_row_brings_are_told_from_those_that_stand_in_the_prompt(tmp_path: Path) -> None:
    train = [row(f"Who bought the {thing}?", f"Somebody bought {thing}.") for thing in ("stool", "lamp", "ring")]
    known = [row("Who bought the kettle?", "Somebody bought kettle.")]
    novel = [row("Who bought the kettle?", "Archibald Featherstonehaugh, Llanfairpwllgwyngyll")]
    (tmp_path / "a").mkdir()
    found = qlora("advise", recipe_with(tmp_path / "a", train, known), "--rows", 0, "--json").json
    assert found["novelty"]["unseen_words"] == 0
    found = qlora("advise", recipe_with(tmp_path, train, novel), "--rows", 0, "--json").json
    assert found["novelty"]["unseen_words"] == 1 and found["verdict"] == "retrieve"


def test_behind_examples_only_the_rows_own_tokens_are_scored() -> None:
    ids = np.arange(5, dtype=np.int32)
    own = Example("a:1", ids, np.where(ids < 2, IGNORED, ids).astype(np.int32))
    whole = behind([own, own], own)
    assert whole.input_ids.tolist() == [*range(5)] * 3 and whole.boundaries == ()
    assert whole.labels.tolist() == [IGNORED] * 10 + own.labels.tolist()
    assert whole.trained_tokens() == own.trained_tokens()
    assert contradictions([own, own]) == 0


def test_the_bases_losses_are_those_that_eval_measures(tmp_path: Path) -> None:
    path = recipe_with(tmp_path, LINES[:120], LINES[200:216])
    found = qlora("advise", path, "--rows", 16, "--json").json
    shot = found["few_shot"]
    measured = qlora("eval", BASE, "--data", tmp_path / "held.jsonl", "--json").json
    # `eval` of a model computes in its own bfloat16, the recipe in float32
    assert shot["rows"] == 16 and shot["loss"] == pytest.approx(measured["loss"], rel=0.02)
    assert shot["shots"] >= 2 and shot["few_shot_loss"] < shot["loss"]  # the base learnt to copy from what it sees


def found_with(**changes: float) -> dict:
    given = {"kept": 500, "unseen_words": 0.0, "loss": 2.0, "few_shot_loss": 1.9, "trained_tokens": 1000} | changes
    data = {
        "duplicates": 0,
        "contradictions": given.get("contradictions", 0),
        "rows": given["kept"],
        "kept": given["kept"],
        "trained_tokens": given["trained_tokens"],
        "largest_adapter_parameters": 1000,
    }
    shot = {"rows": 9, "shots": 4, "loss": given["loss"], "few_shot_loss": given["few_shot_loss"]}
    return {"data": data, "novelty": {"near": 0.0, "unseen_words": given["unseen_words"]}, "few_shot": shot}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "lora"),
        ({"loss": KNOWN_LOSS / 2, "few_shot_loss": KNOWN_LOSS / 2}, "prompt"),
        ({"unseen_words": UNSEEN + 0.1}, "retrieve"),
        ({"kept": FEW_ROWS - 1, "few_shot_loss": 2 * (1 - PROMPTED) - 0.1}, "prompt"),
        ({"kept": FEW_ROWS - 1}, "lora"),
        ({"trained_tokens": 2001}, "full"),
        ({"contradictions": 101}, "clean"),
    ],
)
def test_each_verdict_follows_from_its_number(changes: dict, verdict: str) -> None:
    said, reasons = judge(found_with(**changes))
    assert said == verdict and verdict in VERDICTS
    assert all(reason.source and any(sign.isdigit() for sign in reason.text) for reason in reasons)


@pytest.mark.slow
def test_what_the_base_can_do_already_needs_a_prompt_only(tmp_path: Path) -> None:
    path = recipe_with(tmp_path, LINES[:900], LINES[900:930])
    assert qlora("train", path, "train.max_steps=90", "adapter.rank=16", "train.micro_batch=16",
                 "train.global_batch=16").code == 0  # fmt: skip
    assert qlora("export", tmp_path / "run", tmp_path / "merged", "--to", "merged", "--rows", 0).code == 0
    found = qlora("advise", path, f"model.name={tmp_path / 'merged'}", "--rows", 16, "--json").json
    assert found["verdict"] == "prompt" and found["few_shot"]["loss"] < KNOWN_LOSS


def test_after_a_run_it_says_what_eval_and_inspect_measure(tmp_path: Path) -> None:
    assert qlora("train", recipe_with(tmp_path, LINES[:200], LINES[200:230])).code == 0
    found = qlora("advise", tmp_path / "run", "--json").json
    measured = qlora("eval", tmp_path / "run", "--beside-base", "--json").json
    rank = qlora("inspect", tmp_path / "run", "--json").json
    assert found["learnt"]["loss"] == measured["loss"] and found["learnt"]["base_loss"] == measured["base"]["loss"]
    assert found["forgot"]["loss"] == measured["forgetting"]["loss"]
    assert found["rank"] == {key: rank[key] for key in ("verdict", "suggested_rank", "reason")}
    assert found["learnt"]["train_loss"] < found["learnt"]["base_loss"]
    told = "\n".join(reason["text"] for reason in found["reasons"])
    assert "it learnt: held-out loss" in told and "general text" in told and "rank" in told
    said = qlora("advise", tmp_path / "run")
    assert said.code == 0 and said.out == "" and all(reason["text"] in said.err for reason in found["reasons"])


@pytest.mark.parametrize(
    "words", [("nowhere.yaml",), (".",), ("recipe.yaml", "data.eval=null", "data.eval_fraction=0")]
)
def test_what_can_not_be_advised_on_is_one_line_and_exit_code_2(words: tuple, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe_with(tmp_path, LINES[:5], LINES[5:7])
    said = qlora("advise", *words, "--rows", 0)
    assert said.code == 2 and said.out == "" and said.err.count("\n") == 1, said.err
