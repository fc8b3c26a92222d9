"""Other trainers' files beyond their key names: how to recognize them, their defaults, keys that need no setting here.

Defaults are written in the tool's own keys and read through aliases.py. Listed are those that change the result and
that qlora has too. Sources: TRL 1.16 (trainer/sft_config.py, trainer/model_config.py) on transformers 5.23
(training_args.py); Axolotl (utils/schemas/training.py, peft.py); LLaMA-Factory (hparams/data_args.py). Other
defaults of the last two are their documentation's, not read in their code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_TRAINER = {  # transformers.TrainingArguments, which TRL and LLaMA-Factory build on
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "optim": "adamw_torch_fused",
    "seed": 42,
}


@dataclass(frozen=True)
class Tool:
    """One trainer: keys that only it has, and its behavior for keys that its file leaves out."""

    name: str
    own_keys: frozenset[str]
    defaults: Mapping[str, Any]  # in its own keys
    fixed_settings: Mapping[str, Any]  # behavior that it has no key for, in qlora's keys
    missing_keys: Mapping[str, str]  # key -> what its absence means, where qlora has no setting for that


TOOLS = (
    Tool(
        "Axolotl",
        frozenset({"base_model", "sequence_len", "datasets", "num_epochs", "micro_batch_size", "lora_target_linear"})
        | {"sample_packing", "val_set_size", "dataset_prepared_path", "train_on_inputs", "adapter", "flash_attention"},
        {
            "sequence_len": 512,
            "sample_packing": False,
            "val_set_size": 0.0,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "num_epochs": 1.0,
            "optimizer": "adamw_torch_fused",
            "lr_scheduler": "cosine",
            "max_grad_norm": 1.0,
            "lora_dropout": 0.0,
            "load_in_4bit": False,
            "seed": 42,
        },
        {},
        {},
    ),
    Tool(
        "LLaMA-Factory",
        frozenset({"stage", "finetuning_type", "cutoff_len", "template", "lora_rank", "lora_target", "do_train"})
        | {"dataset_dir", "quantization_bit", "val_size", "overwrite_cache", "double_quantization"},
        {
            **_TRAINER,
            "learning_rate": 5e-5,
            "lora_rank": 8,
            "lora_dropout": 0.0,
            "lora_target": "all",
            "cutoff_len": 2048,
            "packing": False,
            "val_size": 0.0,
            "load_in_4bit": False,
        },
        {"data.overlong": "truncate"},
        {},
    ),
    Tool(
        "TRL",
        frozenset({"use_peft", "dataset_name", "lora_r", "max_length", "use_bnb_nested_quant", "eval_strategy"})
        | {"assistant_only_loss", "dataset_config", "attn_implementation", "lora_task_type", "dataset_num_proc"}
        | {"loss_type", "simpo_gamma", "desirable_weight", "undesirable_weight", "precompute_ref_log_probs"},
        {
            **_TRAINER,
            "learning_rate": 2e-5,
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "max_length": 1024,
            "packing": False,
            "test_split_size": 0.0,
            "load_in_4bit": False,
        },
        {"data.overlong": "truncate"},
        {
            "lora_target_modules": "missing: PEFT then chooses by architecture (Llama: q_proj and v_proj). "
            "Here it is all-linear.",
            "assistant_only_loss": "missing: TRL then trains every token of a conversation, but of prompt and "
            "completion only the latter. Here it is the assistant's tokens; data.train_on: all trains every token.",
        },
    ),
)

ALWAYS = "every value"
NO_SETTING_NEEDED: Mapping[str, tuple[Any, ...] | str] = {  # key -> the values for which it needs no setting here
    "use_peft": (True,),
    "finetuning_type": ("lora",),
    "do_train": (True,),
    "lora_task_type": ("CAUSAL_LM",),
    "model_type": ("AutoModelForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"),
    "tokenizer_type": ("AutoTokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast"),
    "trust_remote_code": (False,),
    "bnb_4bit_quant_storage": ("uint8",),
    "strict": (False, True),
    "ddp_timeout": ALWAYS,
    "overwrite_cache": ALWAYS,
    "dataset_prepared_path": ALWAYS,
    "preprocessing_num_workers": ALWAYS,
    "dataloader_num_workers": ALWAYS,
    "dataset_num_proc": ALWAYS,
    "pad_to_sequence_len": ALWAYS,
    "gradient_checkpointing_kwargs": ALWAYS,
    "plot_loss": (True,),
}

REPLACEMENTS: Mapping[str, str] = {  # keys without an alias, and what to write instead
    "evals_per_epoch": "Evaluations are counted in steps: write train.eval_every.",
    "saves_per_epoch": "Checkpoints are counted in steps: write train.save_every.",
    "eval_strategy": "Evaluations are counted in steps: write train.eval_every.",
    "save_strategy": "Checkpoints are counted in steps: write train.save_every.",
    "template": "The base model's chat template is used; for another one write model.chat_template: FILE.jinja.",
    "special_tokens": "The base model's tokenizer is used unchanged.",
    "max_samples": "Write max_samples in each data set of data.train.",
    "overwrite_output_dir": "Write train.resume: never to start from scratch.",
    "finetuning_type": "To train every weight write adapter.kind: full and quant.kind: dense.",
    "use_peft": "To train every weight write adapter.kind: full and quant.kind: dense.",
    "wandb_name": "The run is named after train.output.",
    "run_name": "The run is named after train.output.",
    "dataset_config": "Write the path of its files in data.train.",
}


def recognize(keys: set[str]) -> Tool | None:
    """The tool with the most own keys among `keys`; None if no tool has any."""
    best = max(TOOLS, key=lambda tool: len(tool.own_keys & keys))
    return best if best.own_keys & keys else None
