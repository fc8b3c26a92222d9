"""Token ids and positions of the data are held against the rows of the base, by `check` as by `train`."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.architectures import save_architecture
from support.small_runs import recipe_of, run
from support.tiny_models import byte_tokenizer

from qlora.errors import AdapterError, DataError, InputError
from qlora.recipe.check import check_contents
from qlora.recipe.recipe import Recipe

ROWS = len(byte_tokenizer())  # of the embedding: a token that is added has none


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_architecture(tmp_path_factory.mktemp("base"), "llama", 10**6, {"vocab_size": ROWS})
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    return folder


def recipe_with(base: Path, folder: Path, text: str, *options: str) -> Recipe:
    data = folder / "rows.jsonl"
    data.write_text(json.dumps({"text": "good"}) + "\n" + json.dumps({"text": text}) + "\n")
    return recipe_of(base, data, folder / "run", "train.max_steps=1", *options)


def problems(recipe: Recipe) -> list[str]:
    result: dict[str, Any] = {"ok": False, "problems": [], "warnings": [], "data": None, "memory": None}
    check_contents(recipe, result)
    return [problem["message"] for problem in result["problems"]]


def test_a_token_without_a_row_is_named_by_check_and_train(base: Path, tmp_path: Path) -> None:
    recipe = recipe_with(base, tmp_path, "a <extra> b")
    message = f"token '<extra>' (id {ROWS}) has no row in the model's embedding, which has {ROWS} rows"
    (problem,) = problems(recipe)
    with pytest.raises(DataError) as caught:
        run(recipe)
    assert message in problem and message in str(caught.value)
    assert "rows.jsonl:2" in str(caught.value) and "adapter.new_tokens" in problem
    assert caught.value.exit_code == 2


def test_the_remedy_of_the_message_works(base: Path, tmp_path: Path) -> None:
    recipe = recipe_with(base, tmp_path, "a <extra> b", "adapter.new_tokens=[<extra>]")
    assert problems(recipe) == []
    assert run(recipe)["result"]["steps"] == 1


def test_tokens_and_new_tokens_do_not_send_in_a_circle(base: Path, tmp_path: Path) -> None:
    recipe = recipe_with(base, tmp_path, "good too", "adapter.tokens=[<extra>]")
    with pytest.raises(AdapterError, match=r"has no row in this base.*Use adapter\.new_tokens"):
        run(recipe)


def test_ids_of_tokenized_records_are_held_against_the_rows(base: Path, tmp_path: Path) -> None:
    recipe = recipe_with(base, tmp_path, "good")
    ids = [5, ROWS, 7]
    Path(recipe.data.train[0].path).write_text(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    (problem,) = problems(recipe)
    assert f"id {ROWS}" in problem
    with pytest.raises(DataError, match="has no row"):
        run(recipe)


@pytest.mark.parametrize("kind", ["opt", "gpt_neo"])
def test_a_document_beyond_the_learned_positions_is_refused(kind: str, tmp_path: Path) -> None:
    folder = save_architecture(tmp_path / "model", kind, 10**6, {"max_position_embeddings": 32})
    recipe = recipe_with(folder, tmp_path, "a" * 60)
    message = "the model has learned 32 positions. Set data.max_length=32"
    assert any(message in problem for problem in problems(recipe))
    with pytest.raises(InputError, match=message):
        run(recipe)
    assert problems(recipe_with(folder, tmp_path, "a" * 60, "data.max_length=32")) == []
