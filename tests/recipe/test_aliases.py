"""Aliases: settings of other trainers mean the same here, are reported, and contradictions are errors."""

import pytest
from support.recipe_texts import MINIMAL, problems_of

from qlora.recipe.aliases import ALIASES
from qlora.recipe.recipe import SECTIONS, from_mapping


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_every_alias_maps_to_existing_settings(alias):
    known = {f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields}
    keys = [*ALIASES[alias](True), *ALIASES[alias](False), *ALIASES[alias]("x")]
    assert {key.removesuffix("?") for key in keys} - {"train.accumulation"} <= known
    assert alias not in SECTIONS


SAME_RUN = {
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


def test_the_same_settings_of_three_trainers_are_the_same_recipe():
    recipes = [from_mapping(settings)[0] for settings in SAME_RUN.values()]
    expected, _ = from_mapping(
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
        assert recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": (format_free,)})}) == expected


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
            "adapter.rank: set twice, also by recipe.yaml:3: lora_r (read as adapter.rank).",
        ),
        (
            "adapter: {rank: 8}\nlora_r: 8",
            "lora_r (read as adapter.rank): set twice, also by recipe.yaml:3: adapter.rank.",
        ),
        ("lora_r: 8\nlora_rank: 8", "lora_rank (read as adapter.rank): set twice"),
        ("base_model: x", "base_model (read as model.name): set twice, also by recipe.yaml:1: model."),
        ("use_dora: true\nuse_rslora: true", "use_rslora (read as adapter.kind): set twice"),
        ("load_in_4bit: true\nquant: {kind: dense}", "load_in_4bit: contradicts recipe.yaml:4: quant.kind: dense."),
        (
            "train: {global_batch: 8}\ngradient_accumulation_steps: 8",
            "set twice, also by recipe.yaml:3: train.global_batch.",
        ),
        ("gradient_accumulation_steps: 0", "found 0, allowed: a whole number >= 1."),
        ("lora_r: eight", "lora_r (read as adapter.rank): found 'eight' (text), allowed: a whole number >= 1."),
        ("load_in_8bit: true", "load_in_8bit (read as quant.kind): no 'int8' (text)."),
    ],
)
def test_a_wrong_alias_is_an_error_under_its_own_name(read_recipe, text, message):
    assert message in problems_of(read_recipe, f"{MINIMAL}{text}\n")[0]


def test_accumulation_follows_the_final_micro_batch(read_recipe):
    text = f"{MINIMAL}per_device_train_batch_size: 2\ngradient_accumulation_steps: 4\n"
    assert read_recipe(text)[0].train.global_batch == 8
    assert read_recipe(text, "train.micro_batch=4")[0].train.global_batch == 16
    assert read_recipe(text, "train.global_batch=5")[0].train.global_batch == 5
    assert (
        read_recipe(f"{MINIMAL}train: {{global_batch: 5}}\n", "gradient_accumulation_steps=3")[0].train.global_batch
        == 3
    )
