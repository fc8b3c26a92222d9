"""The section `objective`: settings of other kinds, data of another kind, names of other trainers."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora.config import parse
from qlora.errors import RecipeError
from qlora.recipe.aliases import ALIASES, REMEDIES
from qlora.recipe.check_answers import answer_problems
from qlora.recipe.convert import convert
from qlora.recipe.other_trainers import NO_SETTING_NEEDED, REPLACEMENTS
from qlora.recipe.recipe import Recipe, dump, from_mapping

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
ANSWER = {"prompt": "a", "completion": "b", "label": True}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def recipe_with(objective: Mapping[str, Any], **sections: Mapping[str, Any]) -> Recipe:
    data = {"train": "pairs.jsonl"} | dict(sections.pop("data", {}))
    return from_mapping({"model": "m", "data": data, "objective": dict(objective), **sections})[0]


def records(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("objective", "sections", "message"),
    [
        ({"beta": 0.1}, {}, "objective.beta: has no effect: objective.kind sft does not read it"),
        ({"kind": "dpo", "gamma": 0.5}, {}, "objective.gamma: has no effect"),
        ({"kind": "orpo", "reference": "base"}, {}, "objective.reference: has no effect"),
        ({"kind": "dpo", "beta": 0}, {}, "objective.beta: found 0, allowed: a number > 0"),
        ({"kind": "ppo"}, {}, "objective.kind: no 'ppo'"),
        ({"kind": "dpo"}, {"data": {"format": "messages"}}, "data.format: messages: objective.kind dpo reads"),
        ({"kind": "kto"}, {"data": {"format": "preference"}}, "data.format: preference: objective.kind kto reads"),
        ({}, {"data": {"format": "preference"}}, "Set objective.kind: dpo, ipo, orpo or simpo"),
        ({}, {"data": {"format": "feedback"}}, "Set objective.kind: kto"),
        (
            {"kind": "dpo"},
            {"data": {"overlong": "truncate"}},
            "data.overlong: truncate: a preference for a whole answer",
        ),
        ({"kind": "dpo"}, {"data": {"train_on": "all"}}, "data.train_on: all: objective.kind dpo compares answers"),
        (
            {"kind": "dpo"},
            {"adapter": {"kind": "full"}, "quant": {"kind": "dense"}},
            "Use lora, or an objective without",
        ),
        ({"kind": "dpo", "reference": "runs/a"}, {"train": {"output": "runs/a"}}, "is in this run's own output folder"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(
    objective: Mapping[str, Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as error:
        recipe_with(objective, **sections)
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["sft", "dpo", "ipo", "orpo", "simpo", "kto"])
def test_a_recipe_of_each_kind_is_written_and_read_back(kind: str) -> None:
    recipe = recipe_with({"kind": kind})
    assert from_mapping(parse(dump(recipe), "recipe").value)[0] == recipe


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("dpo", [CHAT], "has the columns messages; objective.kind dpo needs prompt, chosen and rejected"),
        ("sft", [PAIR], "preference pairs (prompt, chosen, rejected), and objective.kind is sft"),
        ("kto", [PAIR], "objective.kind kto needs prompt, completion and label"),
        ("kto", [ANSWER, ANSWER], "every label is true: kto needs both"),
        ("kto", [{**ANSWER, "label": False}], "every label is false"),
    ],
)
def test_data_of_another_kind_is_named_before_anything_is_loaded(
    tmp_path: Path, kind: str, rows: list[dict[str, Any]], message: str
) -> None:
    recipe = recipe_with({"kind": kind}, data={"train": records(tmp_path / "rows.jsonl", rows)})
    (problem,) = answer_problems(recipe)
    assert problem[0] == "data.train" and message in problem[1]


@pytest.mark.parametrize(
    ("kind", "rows"), [("dpo", [CHAT, PAIR]), ("sft", [CHAT]), ("kto", [ANSWER, {**ANSWER, "label": False}])]
)
def test_data_of_the_kind_that_is_compared_is_no_problem(tmp_path: Path, kind: str, rows: list[dict[str, Any]]) -> None:
    recipe = recipe_with({"kind": kind}, data={"train": records(tmp_path / "rows.jsonl", rows)})
    assert list(answer_problems(recipe)) == []


def test_a_reference_that_is_no_adapter_is_named(tmp_path: Path) -> None:
    rows = records(tmp_path / "rows.jsonl", [PAIR])
    recipe = recipe_with({"kind": "dpo", "reference": str(tmp_path / "sft")}, data={"train": rows})
    (problem,) = answer_problems(recipe)
    assert problem[0] == "objective.reference" and "does not exist" in problem[1]


@pytest.mark.parametrize("name", ["DPOConfig", "KTOConfig", "ORPOConfig", "CPOConfig"])
def test_every_setting_of_trl_is_read_converted_or_refused_by_name(name: str) -> None:
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    package = trl
    if name in ("ORPOConfig", "CPOConfig"):
        package = __import__(f"trl.experimental.{name[:-6].lower()}", fromlist=[name])
    own = {field.name for field in dataclasses.fields(getattr(package, name))}
    own -= {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert own - {*ALIASES, *REMEDIES, *NO_SETTING_NEEDED, *REPLACEMENTS} == set()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss_type": "sigmoid", "beta": 0.2}, {"kind": "dpo", "beta": 0.2}),
        ({"loss_type": ["ipo"], "beta": 0.2}, {"kind": "ipo", "beta": 0.2}),
        ({"loss_type": "simpo", "simpo_gamma": 0.8, "cpo_alpha": 0.0}, {"kind": "simpo", "gamma": 0.8}),
        ({"beta": 0.2, "rpo_alpha": 1.0}, {"kind": "dpo", "beta": 0.2, "sft_weight": 1.0}),
        ({"desirable_weight": 1.5, "undesirable_weight": 1.0}, {"kind": "kto", "desirable_weight": 1.5}),
        ({"rl": "orpo", "orpo_alpha": 0.3}, {"kind": "orpo", "beta": 0.3}),
        ({"stage": "dpo", "pref_beta": 0.3, "pref_ftx": 0.5}, {"kind": "dpo", "beta": 0.3, "sft_weight": 0.5}),
        ({"stage": "dpo", "pref_loss": "orpo", "pref_beta": 0.3}, {"kind": "orpo", "beta": 0.3}),
    ],
)
def test_names_of_other_trainers_mean_the_same(settings: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    recipe, notes = from_mapping({"model": "m", "data": {"train": "pairs.jsonl"}, **settings})
    assert recipe == recipe_with(expected) and notes


def test_a_file_of_trl_for_dpo_is_converted(tmp_path: Path) -> None:
    path = tmp_path / "dpo.yaml"
    path.write_text(
        "model_name_or_path: m\ndataset_name: pairs.jsonl\nloss_type: sigmoid\nbeta: 0.2\nuse_peft: true\n"
        "precompute_ref_log_probs: true\nmax_prompt_length: 512\nmax_length: 1024\n"
    )
    converted = convert(str(path))
    recipe = from_mapping(parse(converted.text, "recipe").value)[0]
    assert (recipe.objective.kind, recipe.objective.beta, recipe.data.overlong) == ("dpo", 0.2, "auto")
    assert any(line.startswith("max_prompt_length") for line in converted.not_converted)
