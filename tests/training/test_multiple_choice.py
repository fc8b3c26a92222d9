"""Multiple choice is scored by the letters' logits alone, as an independent implementation scores it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.command_line import qlora
from support.small_runs import recipe_of, run, write_records
from support.tiny_models import FAMILIES

from qlora.data.conversations.encode_records import read_messages
from qlora.data.types import Record
from qlora.errors import DataError
from qlora.runs.evaluate import evaluate_run
from qlora.runs.general_text import GENERAL
from qlora.runs.load_run import LoadedRun, held_out_examples, load_run
from qlora.training.multiple_choice import choice_accuracy, choice_of

Zoo = Callable[..., Path]
pytestmark = pytest.mark.xdist_group("choice")
LETTERS = "ABCD"


def questions(path: Path, count: int = 12, answer: str = "{}") -> Path:
    """Questions of different lengths with four choices; the correct letters are A, B, C, D, A, ..."""
    records = []
    for number in range(count):
        choices = "".join(f"\n{letter}. {letter * (1 + number % 3)}{number}" for letter in LETTERS)
        prompt = f"{'long ' * (number % 5)}question {number}?{choices}\nAnswer:"
        records.append({"prompt": prompt, "completion": answer.format(LETTERS[number % 4])})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@torch.no_grad()
def reference_accuracy(run: LoadedRun, data: Path, before: str = "") -> float:
    """The accuracy, one question at a time, by the logits of the letters after the prompt and the text `before`."""
    tokenizer, correct = run.base.tokenizer, 0
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for number, line in enumerate(lines):
        ids = run.encoder.prompt_ids(
            read_messages(Record("x:1", {"prompt": line["prompt"], "completion": "x"}), "auto")[:1]
        )
        ids = ids + tokenizer(before, add_special_tokens=False)["input_ids"]
        logits = run.base.model(input_ids=torch.tensor([ids])).logits[0, -1]
        candidates = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in LETTERS]
        correct += int(logits[candidates].argmax()) == number % 4
    return correct / len(lines)


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_is_that_of_the_letters_logits(zoo: Zoo, family: str, tmp_path: Path) -> None:
    model_run = load_run(str(zoo(family)))
    base = model_run.base
    data = questions(tmp_path / "questions.jsonl")
    choices = [choice_of(example, base.tokenizer) for example in held_out_examples(model_run, str(data))]
    assert len(choices) == 12 and [choice.correct for choice in choices] == [number % 4 for number in range(12)]
    expected = reference_accuracy(model_run, data)
    assert {choice_accuracy(base.model, choices, micro_batch, base.device) for micro_batch in (1, 5)} == {expected}


def test_a_letter_may_be_in_brackets_and_only_offered_letters_count(zoo: Zoo, tmp_path: Path) -> None:
    model_run = load_run(str(zoo("llama")))
    base = model_run.base
    data = questions(tmp_path / "questions.jsonl", 8, "({}).")
    choices = [choice_of(example, base.tokenizer) for example in held_out_examples(model_run, str(data))]
    assert choice_accuracy(base.model, choices, 3, base.device) == reference_accuracy(model_run, data, "(")
    (tmp_path / "two.jsonl").write_text(json.dumps({"question": "Which?", "choices": ["x", "y"], "answer": 1}) + "\n")
    (example,) = held_out_examples(model_run, str(tmp_path / "two.jsonl"))
    choice = choice_of(example, base.tokenizer)
    assert base.tokenizer.decode(list(choice.letter_ids)) == "AB" and choice.correct == 1
    (tmp_path / "none.jsonl").write_text(json.dumps({"prompt": "What?", "completion": "nothing"}) + "\n")
    (example,) = held_out_examples(model_run, str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match=r"none\.jsonl:1"):
        choice_of(example, base.tokenizer)


@pytest.mark.parametrize("answer", [2, "C"])
def test_mmlu_records_are_read_without_conversion(answer: object) -> None:
    record = Record("x:1", {"question": "Which?", "choices": ["p", "q", "r", "s"], "answer": answer, "subject": "law"})
    question, letter = read_messages(record, "auto")
    assert question.content == "Which?\nA. p\nB. q\nC. r\nD. s\nAnswer:" and letter.content == "C"


@pytest.mark.parametrize(
    "wrong", [{"answer": 4}, {"answer": "E"}, {"answer": True}, {"choices": [1, 2]}, {"choices": ["p"]}]
)
def test_an_invalid_choice_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(DataError, match="wrong"):
        read_messages(
            Record("x:1", {"question": "Which?", "choices": ["p", "q", "r", "s"], "answer": 0} | wrong), "auto"
        )


def test_the_base_model_is_evaluated_with_the_tuned_one(zoo: Zoo, tmp_path: Path) -> None:
    data, choices = write_records(tmp_path / "records.jsonl", 4), questions(tmp_path / "choices.jsonl", 8)
    model = zoo("llama-tied-bias")
    run(recipe_of(model, data, tmp_path / "run", "optim.learning_rate=0.02", "train.max_steps=4"))
    loaded, base_model = load_run(str(tmp_path / "run")), load_run(str(model))
    for task, file in (("loss", str(data)), ("choice", str(choices))):
        both = evaluate_run(loaded, file, task, beside_base=True)
        tuned, base = evaluate_run(loaded, file, task), evaluate_run(base_model, file, task)
        assert {key: both[key] for key in tuned} == tuned
        expected = {key: value for key, value in base.items() if key != "task"}
        assert both["base"].pop("score") == expected.pop("score")
        assert both["base"] == pytest.approx(expected, rel=1e-6)  # float32, in batches of another size
        assert both["loss"] != both["base"]["loss"] and (task == "loss") == (both["score"] is None)
    forgetting = both["forgetting"]
    assert forgetting["tokens"] > len(GENERAL.read_text()) * 0.9 and forgetting["loss"] != forgetting["base_loss"]
    result = qlora("eval", tmp_path / "run", "--data", data, "--beside-base")
    assert result.out == "" and "base model: loss" in result.err and "general text" in result.err
