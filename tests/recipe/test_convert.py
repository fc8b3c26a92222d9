"""Another trainer's file becomes a recipe that reads, and every key of it is accounted for."""

import json
from pathlib import Path

import pytest
from support.command_line import qlora

from qlora.errors import InputError
from qlora.recipe.aliases import ALIASES
from qlora.recipe.convert import convert
from qlora.recipe.other_trainers import TOOLS
from qlora.recipe.recipe import read

FILES = {
    "Axolotl": """\
base_model: NousResearch/Llama-3.2-1B
model_type: AutoModelForCausalLM
load_in_4bit: true
adapter: qlora
datasets:
  - {path: teknium/GPT4-LLM-Cleaned, type: alpaca}
  - {path: my/chats, type: chat_template, field_messages: conversations}
val_set_size: 0.1
sequence_len: 1024
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_target_linear: true
lora_modules_to_save:
gradient_accumulation_steps: 4
micro_batch_size: 2
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
evals_per_epoch: 4
warmup_ratio: 0.1
special_tokens: {pad_token: <|end_of_text|>}
""",
    "LLaMA-Factory": """\
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
quantization_bit: 4
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: q_proj,v_proj
dataset: identity, rows.jsonl
template: llama3
cutoff_len: 2048
output_dir: saves/sft
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
neat_packing: true
""",
    "TRL": """\
model_name_or_path: Qwen/Qwen2-0.5B
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-4
max_steps: 50
packing: true
use_peft: true
lora_r: 32
load_in_4bit: true
optim: lion_8bit
eval_steps: 100
hub_token: hf_abcdefghijklmnopqrstuvwxyzABCDEFGH
""",
}


def written(folder: Path, text: str) -> Path:
    path = folder / "theirs.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("tool", FILES)
def test_the_result_is_a_recipe_and_its_tool_is_named(tool, tmp_path):
    found = convert(str(written(tmp_path, FILES[tool])))
    assert found.tool == tool
    _, notes = read(written(tmp_path, found.text))
    assert notes == []  # qlora's own names only


@pytest.mark.parametrize("tool", FILES)
def test_every_key_is_carried_needs_no_carrying_or_is_named(tool, tmp_path):
    path = written(tmp_path, FILES[tool])
    said = qlora("convert", path)
    assert said.code == 0
    keys = [line.partition(":")[0] for line in FILES[tool].splitlines() if not line.startswith(" ")]
    for key in keys:
        assert key in said.err or key == "dataset", f"{key} was dropped silently"
    for line in convert(str(path)).left:
        if "hf_" not in line:
            assert " ".join(line.split()) in said.out, "the recipe itself says what it could not carry"


def test_axolotls_values_are_read(tmp_path):
    recipe, _ = read(written(tmp_path, convert(str(written(tmp_path, FILES["Axolotl"]))).text))
    assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.quant.kind) == (32, 16, "nf4")
    assert (recipe.train.micro_batch, recipe.train.global_batch, recipe.optim.warmup) == (2, 8, 0.1)
    assert [each.format for each in recipe.data.train] == ["alpaca", "auto"]
    assert (recipe.data.packing, recipe.data.max_length, recipe.optim.schedule) == (True, 1024, "cosine")


def test_the_other_tools_defaults_hold_where_its_file_is_silent(tmp_path):
    recipe, _ = read(written(tmp_path, convert(str(written(tmp_path, FILES["LLaMA-Factory"]))).text))
    assert (recipe.adapter.alpha, recipe.data.packing, recipe.data.overlong) == (32, False, "truncate")
    assert (recipe.optim.max_grad_norm, recipe.data.eval_fraction, recipe.train.seed) == (1.0, 0.0, 42)
    recipe, _ = read(written(tmp_path, convert(str(written(tmp_path, FILES["TRL"]))).text))
    assert (recipe.train.max_steps, recipe.quant.double, recipe.adapter.dropout) == (50, False, 0.05)


def test_a_value_without_counterpart_is_named_with_what_there_is(tmp_path):
    left = "\n".join(convert(str(written(tmp_path, FILES["TRL"]))).left)
    assert "optim.kind: lion_8bit" in left and "paged_adamw_8bit" in left
    assert "train.eval_every: 100; has no effect" in left


def test_llama_factorys_names_are_looked_up_where_dataset_info_is_at_hand(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"identity": {"file_name": "identity.json"}}))
    found = convert(str(written(tmp_path, FILES["LLaMA-Factory"])))
    recipe, _ = read(written(tmp_path, found.text))
    assert [Path(each.path).name for each in recipe.data.train] == ["identity.json", "rows.jsonl"]
    assert not [line for line in found.left if line.startswith("dataset:")]


def test_no_secret_goes_into_the_recipe(tmp_path):
    said = qlora("convert", written(tmp_path, FILES["TRL"]))
    assert "hub_token" in said.out and "hf_abcdefgh" not in said.out + said.err


@pytest.mark.parametrize("text", ["", "a: 1\n", "- 1\n", "model: x\ndata: {train: y}\n", "lora_r: 8\nadapter: lora\n"])
def test_what_is_no_such_file_is_refused(text, tmp_path):
    with pytest.raises(InputError):
        convert(str(written(tmp_path, text)))


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_every_default_is_a_key_that_the_aliases_know(tool):
    assert {*tool.defaults} - {*ALIASES} <= {"optim"}


def test_a_file_is_written_once(tmp_path):
    path, out = written(tmp_path, FILES["TRL"]), tmp_path / "recipe.yaml"
    assert qlora("convert", path, out).code == 0 and read(out)
    assert qlora("convert", path, out).code == 2
