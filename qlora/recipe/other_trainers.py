"""What other trainers' files mean beyond their key names: marks, defaults, what is done here anyway.

Defaults are written in the tool's own keys and read through aliases.py. Only those are listed that shape the result and
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
    """One trainer: keys that only it has, and what it does where its file says nothing."""

    name: str
    marks: frozenset[str]
    defaults: Mapping[str, Any]  # in its own keys
    habits: Mapping[str, Any]  # what no key of its own says, in qlora's keys
    unsaid: Mapping[str, str]  # keys whose absence means what can't be written here, and what that is


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
        | {"assistant_only_loss", "dataset_config", "attn_implementation", "lora_task_type", "dataset_num_proc"},
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
            "lora_target_modules": "not written: PEFT then picks by architecture (of Llama q_proj and v_proj). "
            "Here it is all-linear.",
            "assistant_only_loss": "not written: TRL then learns every word of a conversation, but of prompt and "
            "completion only the latter. Here it is the assistant's words; data.train_on: all learns every word.",
        },
    ),
)

ALWAYS = "every value"
DONE_ANYWAY: Mapping[str, tuple[Any, ...] | str] = {  # key -> the values under which it asks for what qlora does
    "use_peft": (True,),
    "finetuning_type": ("lora",),
    "stage": ("sft",),
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

INSTEAD: Mapping[str, str] = {  # keys that people will look for, and what to write for them
    "evals_per_epoch": "Evaluations are counted in steps: write train.eval_every.",
    "saves_per_epoch": "Checkpoints are counted in steps: write train.save_every.",
    "eval_strategy": "Evaluations are counted in steps: write train.eval_every.",
    "save_strategy": "Checkpoints are counted in steps: write train.save_every.",
    "template": "The base's own chat template is used; for another one write model.chat_template: FILE.jinja.",
    "special_tokens": "The base's tokenizer is used as it is.",
    "max_samples": "Write max_samples on each set of data.train.",
    "overwrite_output_dir": "train.resume: never starts anew.",
    "finetuning_type": "For every weight write adapter.kind: full and quant.kind: dense.",
    "use_peft": "For every weight write adapter.kind: full and quant.kind: dense.",
    "stage": "Only supervised fine-tuning is built.",
    "rl": "Only supervised fine-tuning is built.",
    "wandb_name": "The run is named after train.output.",
    "run_name": "The run is named after train.output.",
    "dataset_config": "Write the path of its files in data.train.",
}


def recognised(keys: set[str]) -> Tool | None:
    """The tool whose own keys are there most; None if there are none of any."""
    best = max(TOOLS, key=lambda tool: len(tool.marks & keys))
    return best if best.marks & keys else None
