"""Reading a recipe: its defaults, and for every wrong setting an error with line, found value and allowed values."""

import pytest
from support.recipe_texts import MINIMAL, problems_of

from qlora.recipe.recipe import Recipe, dump, from_mapping, read


def test_a_minimal_recipe_has_every_default(read_recipe):
    recipe, notes = read_recipe(MINIMAL)
    assert recipe.model.name == "m"
    assert recipe.data.train[0].path == "rows.jsonl"
    assert recipe.adapter.rank == 16
    assert notes == []


WRONG = {
    "adapter: {rnak: 8}": "adapter.rnak: not a setting. Did you mean 'rank'? Known: alpha, alpha_pattern, dropout,",
    "adapter: {learning_rate: 1}": "adapter.learning_rate: not a setting. Did you mean 'optim.learning_rate'?",
    "adapter: {lora_alpha: 1}": "adapter.lora_alpha: not a setting. Did you mean 'adapter.alpha'?",
    "adaptre: {rank: 8}": "adaptre: not a setting. Did you mean 'adapter'?",
    "rank: 8": "rank: not a setting. Did you mean 'adapter.rank'?",
    "lora_rnk: 8": "lora_rnk: not a setting. Did you mean 'lora_rank'?",
    "deepspeed: zero3.json": "deepspeed: not a setting. Processes and sharding come from accelerate launch",
    "train: {micro_batch: four}": "train.micro_batch: found 'four' (text), allowed: a whole number >= 1.",
    "train: {micro_batch: 2.0}": "train.micro_batch: found 2.0, allowed: a whole number >= 1.",
    "train: {micro_batch: true}": "train.micro_batch: found true, allowed: a whole number >= 1.",
    "train: {seed: -1}": "train.seed: found -1, allowed: a whole number >= 0 and <= 4294967295.",
    "train: {report_to: [wandb, wanb]}": "train.report_to[1]: found 'wanb' (text), allowed: aim,",
    "train: {report_to: wandb}": "train.report_to: found 'wandb' (text), allowed: a list, each aim,",
    "train: {output: null}": "train.output: found null, allowed: text.",
    "train: {output: 12e5}": "train.output: found 1200000.0, allowed: text. Text that looks like a number or a truth",
    "optim: {betas: '0.9,0.95'}": "optim.betas: found '0.9,0.95' (text), allowed: a list of 2, each a number >= 0 and "
    "< 1. A list is written in brackets: [0.9,0.95].",
    "train: 8": "train: found 8, allowed: a group of output, epochs,",
    "quant: {kind: nf5}": "quant.kind: no 'nf5' (text). Did you mean 'nf4'? Known: dense, fp4, nf4.",
    "quant: {block: 60}": "quant.block: found 60, allowed: 32, 64, 128,",
    "quant: {double: no}": "quant.double: found 'no' (text), allowed: true or false.",
    "adapter: {rank: 0}": "adapter.rank: found 0, allowed: a whole number >= 1.",
    "adapter: {alpha: 0}": "adapter.alpha: found 0, allowed: a number > 0.",
    "adapter: {dropout: 1}": "adapter.dropout: found 1, allowed: a number >= 0 and < 1.",
    "adapter: {targets: []}": "adapter.targets: a list of the wrong length",
    "adapter: {targets: '[q'}": "adapter.targets: '[q' is not a regular expression",
    "optim: {learning_rate: .inf}": "optim.learning_rate: found Infinity, allowed: a number > 0.",
    "optim: {learning_rate: '2e-4'}": "optim.learning_rate: found '2e-4' (text), allowed: a number > 0.",
    "optim: {betas: [0.9]}": "optim.betas: a list of the wrong length, allowed: a list of 2, each a number >= 0",
    "optim: {betas: [0.9, 1.0]}": "optim.betas[1]: found 1.0, allowed: a number >= 0 and < 1.",
    "optim: {warmup: 1.5}": "optim.warmup: found 1.5, allowed: a whole number >= 0 or a number >= 0 and < 1.",
    "optim: {max_grad_norm: 0}": "optim.max_grad_norm: found 0, allowed: a number > 0 or null.",
    "memory: {budget: 24}": "memory.budget: found 24, allowed: auto or a text such as 24GiB, 24GB, 512MiB.",
    "memory: {budget: 0GiB}": "memory.budget: found '0GiB' (text)",
    "memory: {recompute: some}": "memory.recompute: found 'some' (text), allowed: auto, all, none or a whole number",
    "distributed: {kind: fdsp}": "distributed.kind: no 'fdsp' (text). Did you mean 'fsdp'?",
}


@pytest.mark.parametrize("line", WRONG)
def test_an_error_names_line_key_found_and_allowed_values(read_recipe, line):
    [message] = problems_of(read_recipe, f"{MINIMAL}{line}\n")
    assert message.startswith(f"recipe.yaml:3: {WRONG[line]}"), message


CONFLICTS = {
    "quant: {kind: dense, block: 64}": "quant.block: has no effect",
    "adapter: {kind: full, rank: 8}\nquant: {kind: dense}": "adapter.rank: has no effect",
    "adapter: {kind: full}": "adapter.kind: full trains every weight",
    "adapter: {init: loftq}\nquant: {kind: dense}": "adapter.init: loftq starts from the quantization error",
    "adapter: {kind: full}\nquant: {kind: dense}\noptim: {loraplus_ratio: 16}": "optim.loraplus_ratio: has no effect",
    "train: {epochs: 1, max_steps: 5}": "train.epochs: has no effect",
    "train: {early_stop: 3}": "train.early_stop: has no effect",
    "train: {early_stop_on: loss}": "train.early_stop_on: has no effect: train.early_stop is not set",
    "train: {early_stop: 3, eval_every: 2, early_stop_on: accuracy}": "train.early_stop_on: accuracy: objective.kind",
}


@pytest.mark.parametrize("line", CONFLICTS)
def test_a_setting_without_effect_is_an_error(read_recipe, line):
    [message] = problems_of(read_recipe, f"{MINIMAL}{line}\n")
    assert f": {CONFLICTS[line]}" in message
    assert message.startswith("recipe.yaml:"), message


@pytest.mark.parametrize("key", ["eval_every", "early_stop"])
def test_evaluation_settings_need_evaluation_data(read_recipe, key):
    text = f"model: m\ndata: {{train: r, eval_fraction: 0}}\ntrain:\n  {key}: 3\n"
    assert problems_of(read_recipe, text)[0].startswith(
        f"recipe.yaml:4: train.{key}: has no effect: there is no evaluation data"
    )


def test_an_evaluation_set_excludes_a_fraction(read_recipe):
    text = "model: m\ndata:\n  train: r\n  eval: e\n  eval_fraction: 0.1\n"
    assert problems_of(read_recipe, text) == [
        "recipe.yaml:5: data.eval_fraction: has no effect: data.eval names the evaluation data. Remove it."
    ]


def test_null_is_unset_where_a_setting_can_have_no_effect(read_recipe):
    recipe, _ = read_recipe(f"{MINIMAL}quant: {{kind: dense, double: null, block: null}}\nadapter: {{rank: null}}\n")
    assert recipe.adapter.rank == 16
    assert "block: null" in dump(recipe)


def test_all_problems_are_listed_in_the_order_of_the_file(read_recipe):
    text = "modle: m\ndata: {train: [{path: 3}], max_length: 0}\nquant: {kind: nf5}\nquant: 3\n"
    text += "lora_r: x\ntrain: &a {seed: .1}\n"
    lines = problems_of(read_recipe, text, "optim.lr=3", "--nothing")
    locations = [line.split(": ", 2)[:2] for line in lines]
    assert locations == [
        ["recipe.yaml:1", "modle"],
        ["recipe.yaml:2", "data.train[0].path"],
        ["recipe.yaml:2", "data.max_length"],
        ["recipe.yaml:3", "quant.kind"],
        ["recipe.yaml:4", "quant"],
        ["recipe.yaml:5", "lora_r (read as adapter.rank)"],
        ["recipe.yaml:6", "train"],
        ["recipe.yaml:6", "train.seed"],
        ["command line", "nothing"],
        ["command line", "optim.lr"],
        ["recipe.yaml", "model.name"],
    ]


def test_no_message_of_pydantic_or_yaml_reaches_the_user(read_recipe):
    for line in [*WRONG, *CONFLICTS]:
        text = " ".join(problems_of(read_recipe, f"{MINIMAL}{line}\n")).lower()
        assert not any(
            word in text for word in ("pydantic", "input should", "validation error", "value_error", "yaml.org")
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe.yaml: is empty. A minimal recipe: "),
        ("# nothing\n", "recipe.yaml: is empty."),
        ("- a\n", "recipe.yaml: found a list, allowed: lines of `key: value`."),
        ("just text\n", "recipe.yaml: found 'just text' (text)"),
    ],
)
def test_a_file_without_settings_shows_a_minimal_recipe(read_recipe, text, message):
    assert problems_of(read_recipe, text)[0].startswith(message)


def test_a_missing_file_is_a_clear_error(tmp_path):
    (tmp_path / "mine.yaml").write_text(MINIMAL)
    assert "no such file. Did you mean 'mine.yaml'?" in problems_of(read, tmp_path / "mien.yaml")[0]
    assert "no such file" in problems_of(read, tmp_path / "nowhere" / "mine.yaml")[0]
    assert "a folder" in problems_of(read, tmp_path)[0]
    assert "can't be read" in problems_of(read, "a\0b")[0]
    assert "can't be read" in problems_of(read, tmp_path / "mine.yaml" / "x")[0]


def test_data_sets_have_short_and_long_forms(read_recipe):
    forms = ["r", "{path: r}", "[r]", "[{path: r}]"]
    recipes = [read_recipe(f"model: m\ndata: {{train: {form}}}\n")[0] for form in forms]
    assert all(recipe == recipes[0] for recipe in recipes)
    assert (
        read_recipe("model: {name: m}\ndata: {train: r, eval: [a, {path: b, weight: 2}]}\n")[0].data.eval[1].weight == 2
    )


def test_a_recipe_is_frozen():
    recipe, _ = from_mapping({"model": "m", "data": {"train": "r"}})
    assert isinstance(recipe, Recipe)
    with pytest.raises(ValueError, match="frozen"):
        recipe.adapter.rank = 8


def test_a_path_in_the_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    train = {"output": "~/runs/a", "resume": "~/runs/b/checkpoint-000002"}
    recipe, _ = from_mapping({"model": "~/base", "data": {"train": "x.jsonl"}, "train": train})
    assert recipe.model.name == "/home/me/base"
    assert (recipe.train.output, recipe.train.resume) == ("/home/me/runs/a", "/home/me/runs/b/checkpoint-000002")
