"""Overrides on the command line: their spellings, their precedence over the file, and their errors."""

import pytest
from support.recipe_texts import MINIMAL, problems_of


@pytest.mark.parametrize(
    "spelling",
    [
        ["adapter.rank=8"],
        ["--adapter.rank=8"],
        ["--adapter.rank", "8"],
        ["lora_r=8"],
        ["--lora-r", "8"],
        ["adapter={rank: 8}"],
    ],
)
def test_every_spelling_of_an_override_has_the_same_effect(read_recipe, spelling):
    assert (
        read_recipe(f"{MINIMAL}adapter: {{rank: 4}}\n", *spelling)[0]
        == read_recipe(f"{MINIMAL}adapter: {{rank: 8}}\n")[0]
    )


def test_dashes_are_underscores_and_values_are_yaml(read_recipe):
    overrides = [
        "--train.micro-batch=2",
        "optim.learning_rate=1e-5",
        "adapter.targets=[q_proj, v_proj]",
        "--optim.warmup",
        "0",
    ]
    recipe, _ = read_recipe(MINIMAL, *overrides)
    assert (recipe.train.micro_batch, recipe.optim.learning_rate, recipe.optim.warmup) == (2, 1e-5, 0)
    assert recipe.adapter.targets == ("q_proj", "v_proj")


def test_an_override_of_a_whole_section_replaces_it(read_recipe):
    recipe, _ = read_recipe(f"{MINIMAL}quant: {{kind: fp4, block: 128}}\n", "quant={kind: dense}", "model=other")
    assert (recipe.quant.kind, recipe.model.name) == ("dense", "other")


def test_an_override_removes_the_exclusive_setting_of_the_file(read_recipe):
    assert read_recipe(f"{MINIMAL}train: {{epochs: 3}}\n", "train.max_steps=5")[0].train.max_steps == 5
    assert read_recipe(f"{MINIMAL}train: {{max_steps: 5}}\n", "train.epochs=2")[0].train.max_steps is None
    assert read_recipe("model: m\ndata: {train: r, eval: e}\n", "data.eval_fraction=0.1")[0].data.eval is None
    assert read_recipe("model: m\ndata: {train: r, eval_fraction: 0.1}\n", "data.eval=e")[0].data.eval[0].path == "e"
    assert read_recipe(f"{MINIMAL}train: {{epochs: 3}}\n", "train.max_steps=null")[0].train.epochs == 3
    assert "train.epochs: has no effect" in problems_of(read_recipe, MINIMAL, "train.max_steps=5", "train.epochs=1")[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.rank=x"], "command line: adapter.rank: found 'x' (text), allowed: a whole number >= 1."),
        (["--adapter.rank"], "command line: adapter.rank: no value."),
        (["--adapter.rank", "--train.seed=1"], "command line: adapter.rank: no value."),
        (["adapter.rank"], "command line: adapter.rank: no value."),
        (["adapter.rnak=8"], "command line: adapter.rnak: not a setting. Did you mean 'rank'?"),
        (["adapter.rank=[8"], "command line: adapter.rank: not YAML"),
        (["adapter.rank=!!int 8"], "command line: adapter.rank: a tag"),
        (["=8"], "command line: not a key."),
        (["adapter..rank=8"], "command line: adapter..rank: not a key."),
        (
            ["data.train.path=x"],
            "command line: data.train.path: can't be set alone. Set all of data.train, as in data.train={...}.",
        ),
        (["nowhere.rank=8"], "command line: nowhere.rank: not a setting."),
        (
            ["adapter.rank=8", "adapter.rank=9"],
            "command line: adapter.rank: set twice, also by command line: adapter.rank.",
        ),
        (["quant={kind: nf5}"], "command line: quant.kind: no 'nf5'"),
    ],
)
def test_a_wrong_override_is_named(read_recipe, overrides, message):
    assert problems_of(read_recipe, MINIMAL, *overrides)[0].startswith(message)
