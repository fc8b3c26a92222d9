"""Conversion of another trainer's file: the result is a valid recipe, and every key of the file is accounted for."""

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


def write_file(folder: Path, text: str) -> Path:
    path = folder / "source.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("tool", FILES)
def test_the_result_is_a_recipe_that_names_its_tool(tool, tmp_path):
    converted = convert(str(write_file(tmp_path, FILES[tool])))
    assert converted.tool == tool
    _, notes = read(write_file(tmp_path, converted.text))
    assert notes == []  # qlora's own names only


@pytest.mark.parametrize("tool", FILES)
def test_every_key_is_converted_or_named(tool, tmp_path):
    path = write_file(tmp_path, FILES[tool])
    result = qlora("convert", path)
    assert result.code == 0
    keys = [line.partition(":")[0] for line in FILES[tool].splitlines() if not line.startswith(" ")]
    for key in keys:
        assert key in result.err or key == "dataset", f"{key} was dropped silently"
    for line in convert(str(path)).not_converted:
        if "hf_" not in line:
            assert " ".join(line.split()) in result.out, "the recipe lists the keys that were not converted"


def test_axolotl_values_are_converted(tmp_path):
    recipe, _ = read(write_file(tmp_path, convert(str(write_file(tmp_path, FILES["Axolotl"]))).text))
    assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.quant.kind) == (32, 16, "nf4")
    assert (recipe.train.micro_batch, recipe.train.global_batch, recipe.optim.warmup) == (2, 8, 0.1)
    assert [source.format for source in recipe.data.train] == ["alpaca", "auto"]
    assert (recipe.data.packing, recipe.data.max_length, recipe.optim.schedule) == (True, 1024, "cosine")


def test_defaults_of_the_tool_hold_for_missing_keys(tmp_path):
    recipe, _ = read(write_file(tmp_path, convert(str(write_file(tmp_path, FILES["LLaMA-Factory"]))).text))
    assert (recipe.adapter.alpha, recipe.data.packing, recipe.data.overlong) == (32, False, "truncate")
    assert (recipe.optim.max_grad_norm, recipe.data.eval_fraction, recipe.train.seed) == (1.0, 0.0, 42)
    recipe, _ = read(write_file(tmp_path, convert(str(write_file(tmp_path, FILES["TRL"]))).text))
    assert (recipe.train.max_steps, recipe.quant.double, recipe.adapter.dropout) == (50, False, 0.05)


def test_a_value_without_counterpart_is_named_with_the_allowed_ones(tmp_path):
    lines = "\n".join(convert(str(write_file(tmp_path, FILES["TRL"]))).not_converted)
    assert "optim.kind: lion_8bit" in lines and "paged_adamw_8bit" in lines
    assert "train.eval_every: 100; has no effect" in lines


def test_llama_factory_names_are_looked_up_in_dataset_info(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"identity": {"file_name": "identity.json"}}))
    converted = convert(str(write_file(tmp_path, FILES["LLaMA-Factory"])))
    recipe, _ = read(write_file(tmp_path, converted.text))
    assert [Path(source.path).name for source in recipe.data.train] == ["identity.json", "rows.jsonl"]
    assert not [line for line in converted.not_converted if line.startswith("dataset:")]


def test_no_secret_is_written_to_the_recipe(tmp_path):
    result = qlora("convert", write_file(tmp_path, FILES["TRL"]))
    assert "hub_token" in result.out and "hf_abcdefgh" not in result.out + result.err


@pytest.mark.parametrize("text", ["", "a: 1\n", "- 1\n", "model: x\ndata: {train: y}\n", "lora_r: 8\nadapter: lora\n"])
def test_other_files_are_refused(text, tmp_path):
    with pytest.raises(InputError):
        convert(str(write_file(tmp_path, text)))


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_every_default_is_a_key_of_the_aliases(tool):
    assert {*tool.defaults} - {*ALIASES} <= {"optim"}


def test_an_existing_file_is_not_overwritten(tmp_path):
    path, out = write_file(tmp_path, FILES["TRL"]), tmp_path / "recipe.yaml"
    assert qlora("convert", path, out).code == 0 and read(out)
    assert qlora("convert", path, out).code == 2
