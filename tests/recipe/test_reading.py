"""A recipe is read as meant, or refused with the line, the name and the remedy of every problem at once."""

import pytest

from qlora.errors import RecipeError
from qlora.recipe.aliases import ALIASES
from qlora.recipe.recipe import SECTIONS, Recipe, dump, from_mapping, read

LEAST = "model: m\ndata: {train: rows.jsonl}\n"


@pytest.fixture
def said(tmp_path, monkeypatch):
    """Read a text under overrides; the file is called recipe.yaml."""
    monkeypatch.chdir(tmp_path)

    def read_text(text, *overrides):
        (tmp_path / "recipe.yaml").write_text(text)
        return read("recipe.yaml", overrides)

    return read_text


def problems(call, *arguments):
    with pytest.raises(RecipeError) as raised:
        call(*arguments)
    return str(raised.value).splitlines()


def test_the_least_recipe_has_every_default(said):
    recipe, notes = said(LEAST)
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
    "train: 8": "train: found 8, allowed: a group of output, epochs,",
    "quant: {kind: nf5}": "quant.kind: no 'nf5' (text). Did you mean 'nf4'? Known: dense, fp4, nf4.",
    "quant: {block: 60}": "quant.block: found 60, allowed: 32, 64, 128,",
    "quant: {double: no}": "quant.double: found 'no' (text), allowed: true or false.",
    "adapter: {rank: 0}": "adapter.rank: found 0, allowed: a whole number >= 1.",
    "adapter: {alpha: 0}": "adapter.alpha: found 0, allowed: a number > 0.",
    "adapter: {dropout: 1}": "adapter.dropout: found 1, allowed: a number >= 0 and < 1.",
    "adapter: {targets: []}": "adapter.targets: a list of the wrong length",
    "adapter: {targets: '[q'}": "adapter.targets: '[q' is no regular expression",
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
def test_an_error_names_the_line_the_key_what_was_found_and_what_is_allowed(said, line):
    [message] = problems(said, f"{LEAST}{line}\n")
    assert message.startswith(f"recipe.yaml:3: {WRONG[line]}"), message


CLASHES = {
    "quant: {kind: dense, block: 64}": "quant.block: has no effect",
    "adapter: {kind: full, rank: 8}\nquant: {kind: dense}": "adapter.rank: has no effect",
    "adapter: {kind: full}": "adapter.kind: full trains every weight",
    "adapter: {init: loftq}\nquant: {kind: dense}": "adapter.init: loftq starts from the error",
    "adapter: {kind: full}\nquant: {kind: dense}\noptim: {loraplus_ratio: 16}": "optim.loraplus_ratio: has no effect",
    "train: {epochs: 1, max_steps: 5}": "train.epochs: has no effect",
    "train: {early_stop: 3}": "train.early_stop: has no effect",
}


@pytest.mark.parametrize("line", CLASHES)
def test_a_setting_without_effect_is_an_error(said, line):
    [message] = problems(said, f"{LEAST}{line}\n")
    assert f": {CLASHES[line]}" in message
    assert message.startswith("recipe.yaml:"), message


@pytest.mark.parametrize("key", ["eval_every", "early_stop"])
def test_evaluation_settings_need_held_out_rows(said, key):
    text = f"model: m\ndata: {{train: r, eval_fraction: 0}}\ntrain:\n  {key}: 3\n"
    assert problems(said, text)[0].startswith(f"recipe.yaml:4: train.{key}: has no effect: no rows are held out")


def test_an_evaluation_set_and_a_fraction_are_one_too_many(said):
    text = "model: m\ndata:\n  train: r\n  eval: e\n  eval_fraction: 0.1\n"
    assert problems(said, text) == [
        "recipe.yaml:5: data.eval_fraction: has no effect: data.eval names the held-out rows. Remove it."
    ]


def test_null_says_nothing_where_a_setting_may_be_idle(said):
    recipe, _ = said(f"{LEAST}quant: {{kind: dense, double: null, block: null}}\nadapter: {{rank: null}}\n")
    assert recipe.adapter.rank == 16
    assert "block: null" in dump(recipe)


def test_all_problems_come_at_once_in_the_order_of_the_file(said):
    text = "modle: m\ndata: {train: [{path: 3}], max_length: 0}\nquant: {kind: nf5}\nquant: 3\n"
    text += "lora_r: x\ntrain: &a {seed: .1}\n"
    found = problems(said, text, "optim.lr=3", "--nothing")
    places = [line.split(": ", 2)[:2] for line in found]
    assert places == [
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


def test_no_word_of_the_reader_itself_reaches_the_user(said):
    for line in [*WRONG, *CLASHES]:
        text = " ".join(problems(said, f"{LEAST}{line}\n")).lower()
        assert not any(
            word in text for word in ("pydantic", "input should", "validation error", "value_error", "yaml.org")
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe.yaml: is empty. The least it holds: "),
        ("# nothing\n", "recipe.yaml: is empty."),
        ("- a\n", "recipe.yaml: found a list, allowed: lines of `key: value`."),
        ("just text\n", "recipe.yaml: found 'just text' (text)"),
    ],
)
def test_a_file_without_settings_says_what_belongs_there(said, text, message):
    assert problems(said, text)[0].startswith(message)


def test_a_file_that_is_not_there_is_a_clear_error(tmp_path):
    (tmp_path / "mine.yaml").write_text(LEAST)
    assert "no such file. Did you mean 'mine.yaml'?" in problems(read, tmp_path / "mien.yaml")[0]
    assert "no such file" in problems(read, tmp_path / "nowhere" / "mine.yaml")[0]
    assert "a folder" in problems(read, tmp_path)[0]
    assert "can't be read" in problems(read, "a\0b")[0]
    assert "can't be read" in problems(read, tmp_path / "mine.yaml" / "x")[0]


def test_sources_have_short_and_long_forms(said):
    forms = ["r", "{path: r}", "[r]", "[{path: r}]"]
    recipes = [said(f"model: m\ndata: {{train: {form}}}\n")[0] for form in forms]
    assert all(recipe == recipes[0] for recipe in recipes)
    assert said("model: {name: m}\ndata: {train: r, eval: [a, {path: b, weight: 2}]}\n")[0].data.eval[1].weight == 2


# overrides


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
def test_every_spelling_of_an_override_says_the_same(said, spelling):
    assert said(f"{LEAST}adapter: {{rank: 4}}\n", *spelling)[0] == said(f"{LEAST}adapter: {{rank: 8}}\n")[0]


def test_dashes_are_underscores_and_values_are_yaml(said):
    given = [
        "--train.micro-batch=2",
        "optim.learning_rate=1e-5",
        "adapter.targets=[q_proj, v_proj]",
        "--optim.warmup",
        "0",
    ]
    recipe, _ = said(LEAST, *given)
    assert (recipe.train.micro_batch, recipe.optim.learning_rate, recipe.optim.warmup) == (2, 1e-5, 0)
    assert recipe.adapter.targets == ("q_proj", "v_proj")


def test_an_override_of_a_whole_section_replaces_it(said):
    recipe, _ = said(f"{LEAST}quant: {{kind: fp4, block: 128}}\n", "quant={kind: dense}", "model=other")
    assert (recipe.quant.kind, recipe.model.name) == ("dense", "other")


def test_an_override_takes_away_the_rival_that_the_file_wrote(said):
    assert said(f"{LEAST}train: {{epochs: 3}}\n", "train.max_steps=5")[0].train.max_steps == 5
    assert said(f"{LEAST}train: {{max_steps: 5}}\n", "train.epochs=2")[0].train.max_steps is None
    assert said("model: m\ndata: {train: r, eval: e}\n", "data.eval_fraction=0.1")[0].data.eval is None
    assert said("model: m\ndata: {train: r, eval_fraction: 0.1}\n", "data.eval=e")[0].data.eval[0].path == "e"
    assert said(f"{LEAST}train: {{epochs: 3}}\n", "train.max_steps=null")[0].train.epochs == 3
    assert "train.epochs: has no effect" in problems(said, LEAST, "train.max_steps=5", "train.epochs=1")[0]


@pytest.mark.parametrize(
    ("given", "message"),
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
        (["data.train.path=x"], "command line: data.train.path: can't be set alone. Give data.train as a whole"),
        (["nowhere.rank=8"], "command line: nowhere.rank: not a setting."),
        (
            ["adapter.rank=8", "adapter.rank=9"],
            "command line: adapter.rank: said before, by command line: adapter.rank.",
        ),
        (["quant={kind: nf5}"], "command line: quant.kind: no 'nf5'"),
    ],
)
def test_a_wrong_override_is_named(said, given, message):
    assert problems(said, LEAST, *given)[0].startswith(message)


# aliases


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_every_alias_leads_to_settings_that_exist(alias):
    known = {f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields}
    meant = [*ALIASES[alias](True), *ALIASES[alias](False), *ALIASES[alias]("x")]
    assert {key.removesuffix("?") for key in meant} - {"train.accumulation"} <= known
    assert alias not in SECTIONS


PASTED = {
    "TRL": (
        {
            "model_name_or_path": "m",
            "dataset_name": "o/d",
            "max_length": 512,
            "per_device_train_batch_size": 4,
            "packing": False,
        }
        | {
            "gradient_accumulation_steps": 8,
            "num_train_epochs": 2,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "cosine",
        }
        | {"warmup_ratio": 0.1, "optim": "paged_adamw_8bit", "lora_r": 8, "lora_alpha": 16, "load_in_4bit": True}
        | {
            "lora_target_modules": "all-linear",
            "gradient_checkpointing": True,
            "output_dir": "out",
            "report_to": "none",
        }
    ),
    "Axolotl": (
        {
            "base_model": "m",
            "datasets": [{"path": "o/d", "type": "chat_template"}],
            "sequence_len": 512,
            "micro_batch_size": 4,
        }
        | {"sample_packing": False, "gradient_accumulation_steps": 8, "num_epochs": 2, "learning_rate": 1e-4}
        | {
            "lr_scheduler": "cosine",
            "warmup_ratio": 0.1,
            "optimizer": "paged_adamw_8bit",
            "adapter": "qlora",
            "lora_r": 8,
        }
        | {"lora_alpha": 16, "lora_target_linear": True, "load_in_4bit": True, "load_in_8bit": False, "bf16": None}
        | {"gradient_checkpointing": True, "output_dir": "out"}
    ),
    "LLaMA-Factory": (
        {
            "model_name_or_path": "m",
            "dataset": "o/d",
            "cutoff_len": 512,
            "per_device_train_batch_size": 4,
            "packing": False,
        }
        | {
            "gradient_accumulation_steps": 8,
            "num_train_epochs": 2.0,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "cosine",
        }
        | {"warmup_ratio": 0.1, "optim": "paged_adamw_8bit", "lora_rank": 8, "lora_alpha": 16, "lora_target": "all"}
        | {"quantization_bit": 4, "output_dir": "out", "activation_checkpointing": True}
    ),
}


def test_the_same_run_in_the_words_of_three_trainers_is_the_same_recipe():
    recipes = [from_mapping(words)[0] for words in PASTED.values()]
    ours, _ = from_mapping(
        {
            "model": "m",
            "adapter": {"rank": 8, "alpha": 16},
            "data": {"train": "o/d", "max_length": 512, "packing": False},
            "optim": {"kind": "paged_adamw_8bit", "learning_rate": 1e-4, "schedule": "cosine", "warmup": 0.1},
            "train": {"output": "out", "epochs": 2, "micro_batch": 4, "global_batch": 32},
            "memory": {"recompute": "all"},
        }
    )
    for recipe in recipes:
        format_free = recipe.data.train[0].model_copy(update={"format": None})
        assert recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": (format_free,)})}) == ours


def test_every_alias_is_reported():
    _, notes = from_mapping(
        {"model": "m", "dataset": "d", "lora_r": 8, "load_in_4bit": True, "use_dora": True, "lr": 1e-4}
    )
    assert set(notes) == {
        "read dataset as data.train",
        "read lora_r as adapter.rank",
        "read load_in_4bit: true as quant.kind: nf4",
        "read use_dora: true as adapter.kind: dora",
        "read lr as optim.learning_rate",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "lora_r: 8\nadapter: {rank: 8}",
            "adapter.rank: said before, by recipe.yaml:3: lora_r (read as adapter.rank).",
        ),
        (
            "adapter: {rank: 8}\nlora_r: 8",
            "lora_r (read as adapter.rank): said before, by recipe.yaml:3: adapter.rank.",
        ),
        ("lora_r: 8\nlora_rank: 8", "lora_rank (read as adapter.rank): said before"),
        ("base_model: x", "base_model (read as model.name): said before, by recipe.yaml:1: model."),
        ("use_dora: true\nuse_rslora: true", "use_rslora (read as adapter.kind): said before"),
        ("load_in_4bit: true\nquant: {kind: dense}", "load_in_4bit: against recipe.yaml:4: quant.kind: dense."),
        (
            "train: {global_batch: 8}\ngradient_accumulation_steps: 8",
            "said before, by recipe.yaml:3: train.global_batch.",
        ),
        ("gradient_accumulation_steps: 0", "found 0, allowed: a whole number >= 1."),
        ("lora_r: eight", "lora_r (read as adapter.rank): found 'eight' (text), allowed: a whole number >= 1."),
        ("load_in_8bit: true", "load_in_8bit (read as quant.kind): no 'int8' (text)."),
    ],
)
def test_an_alias_that_can_not_be_meant_is_an_error_under_its_own_name(said, text, message):
    assert message in problems(said, f"{LEAST}{text}\n")[0]


def test_accumulation_follows_the_micro_batch_that_counts_in_the_end(said):
    text = f"{LEAST}per_device_train_batch_size: 2\ngradient_accumulation_steps: 4\n"
    assert said(text)[0].train.global_batch == 8
    assert said(text, "train.micro_batch=4")[0].train.global_batch == 16
    assert said(text, "train.global_batch=5")[0].train.global_batch == 5
    assert said(f"{LEAST}train: {{global_batch: 5}}\n", "gradient_accumulation_steps=3")[0].train.global_batch == 3


def test_a_recipe_can_not_be_changed():
    recipe, _ = from_mapping({"model": "m", "data": {"train": "r"}})
    assert isinstance(recipe, Recipe)
    with pytest.raises(ValueError, match="frozen"):
        recipe.adapter.rank = 8
