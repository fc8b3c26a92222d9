"""A choice is scored by the letters' logits alone, as an independent reading of the model scores it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.command_line import qlora
from support.small_runs import recipe_of, run, write_rows
from support.tiny_models import FAMILIES

from qlora.data.conversations.encode_records import messages_of
from qlora.data.types import Record
from qlora.errors import DataError
from qlora.runs.evaluate_and_generate import GENERAL
from qlora.runs.load_run import LoadedRun, held_out, load_run
from qlora.training.multiple_choice import choice_of, choice_share

Zoo = Callable[..., Path]
pytestmark = pytest.mark.xdist_group("choice")
LETTERS = "ABCD"


def questions(path: Path, count: int = 12, answer: str = "{}") -> Path:
    """Questions of different lengths with four choices; the right letter goes round."""
    rows = []
    for number in range(count):
        listed = "".join(f"\n{letter}. {letter * (1 + number % 3)}{number}" for letter in LETTERS)
        asked = f"{'long ' * (number % 5)}question {number}?{listed}\nAnswer:"
        rows.append({"prompt": asked, "completion": answer.format(LETTERS[number % 4])})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@torch.no_grad()
def read_off(opened: LoadedRun, data: Path, before: str = "") -> float:
    """The share of right letters, a row at a time, letters as their tokens after the prompt and what precedes them."""
    tokenizer, right = opened.base.tokenizer, 0
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for number, line in enumerate(lines):
        ids = opened.encoder.prompt_ids(
            messages_of(Record("x:1", {"prompt": line["prompt"], "completion": "x"}), "auto")[:1]
        )
        ids = ids + tokenizer(before, add_special_tokens=False)["input_ids"]
        logits = opened.base.model(input_ids=torch.tensor([ids])).logits[0, -1]
        candidates = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in LETTERS]
        right += int(logits[candidates].argmax()) == number % 4
    return right / len(lines)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_is_that_of_the_letters_logits(zoo: Zoo, family: str, tmp_path: Path) -> None:
    opened = load_run(str(zoo(family)))
    data = questions(tmp_path / "rows.jsonl")
    choices = [choice_of(row, opened.base.tokenizer) for row in held_out(opened, str(data))]
    assert len(choices) == 12 and [each.right for each in choices] == [number % 4 for number in range(12)]
    expected = read_off(opened, data)
    assert {choice_share(opened.base.model, choices, batch, opened.base.device) for batch in (1, 5)} == {expected}


def test_a_letter_may_stand_in_brackets_and_only_offered_ones_count(zoo: Zoo, tmp_path: Path) -> None:
    opened = load_run(str(zoo("llama")))
    data = questions(tmp_path / "rows.jsonl", 8, "({}).")
    choices = [choice_of(row, opened.base.tokenizer) for row in held_out(opened, str(data))]
    assert choice_share(opened.base.model, choices, 3, opened.base.device) == read_off(opened, data, "(")
    (tmp_path / "two.jsonl").write_text(json.dumps({"question": "Which?", "choices": ["x", "y"], "answer": 1}) + "\n")
    (row,) = held_out(opened, str(tmp_path / "two.jsonl"))
    found = choice_of(row, opened.base.tokenizer)
    assert opened.base.tokenizer.decode(list(found.ids)) == "AB" and found.right == 1
    (tmp_path / "none.jsonl").write_text(json.dumps({"prompt": "What?", "completion": "nothing"}) + "\n")
    (row,) = held_out(opened, str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match=r"none\.jsonl:1"):
        choice_of(row, opened.base.tokenizer)


@pytest.mark.parametrize("answer", [2, "C"])
def test_rows_of_mmlu_are_read_as_they_are(answer: object) -> None:
    row = Record("x:1", {"question": "Which?", "choices": ["p", "q", "r", "s"], "answer": answer, "subject": "law"})
    asked, said = messages_of(row, "auto")
    assert asked.content == "Which?\nA. p\nB. q\nC. r\nD. s\nAnswer:" and said.content == "C"


@pytest.mark.parametrize(
    "wrong", [{"answer": 4}, {"answer": "E"}, {"answer": True}, {"choices": [1, 2]}, {"choices": ["p"]}]
)
def test_a_choice_that_is_none_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(DataError, match="wrong"):
        messages_of(Record("x:1", {"question": "Which?", "choices": ["p", "q", "r", "s"], "answer": 0} | wrong), "auto")


def test_the_base_stands_beside_the_tuned_model(zoo: Zoo, tmp_path: Path) -> None:
    data, choices = write_rows(tmp_path / "rows.jsonl", 8), questions(tmp_path / "choices.jsonl")
    model = zoo("llama-tied-bias")
    run(recipe_of(model, data, tmp_path / "run", "optim.learning_rate=0.02", "train.max_steps=4"))
    for task, rows in (("loss", data), ("choice", choices), ("exact-match", data)):
        words = ("--data", rows, "--task", task, "--json")
        found = qlora("eval", tmp_path / "run", *words, "--beside-base").json
        plain, alone = qlora("eval", tmp_path / "run", *words).json, qlora("eval", model, *words).json
        assert {key: found[key] for key in plain} == plain
        expected = {key: value for key, value in alone.items() if key != "task"}
        assert found["base"].pop("score") == expected.pop("score")
        assert found["base"] == pytest.approx(expected, rel=1e-6)  # float32, in batches of another size
        assert found["loss"] != found["base"]["loss"] and (task == "loss") == (found["score"] is None)
    forgetting = found["forgetting"]
    assert forgetting["tokens"] > len(GENERAL.read_text()) * 0.9 and forgetting["loss"] != forgetting["base_loss"]
    said = qlora("eval", tmp_path / "run", "--data", data, "--beside-base")
    assert said.out == "" and "the base alone: loss" in said.err and "general text" in said.err
