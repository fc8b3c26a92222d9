"""Aliases: setting names of TRL, Axolotl, LLaMA-Factory and Unsloth -> settings of qlora.

A reader maps a foreign value to `{our key: our value}`, or to {} if the value changes nothing. `key?` is a default: the
first value of its tuple is used unless the recipe sets the key to another value of the tuple.
"""

from collections.abc import Callable, Mapping
from typing import Any

from qlora.recipe.preference_aliases import PREFERENCE_ALIASES, PREFERENCE_REMEDIES
from qlora.training import RENAMED_OPTIMIZERS

Reader = Callable[[Any], dict[str, Any]]

ACCUMULATION = "train.accumulation"  # not a setting: train.global_batch = train.micro_batch x accumulation


def same_value(target: str) -> Reader:
    """The same value under our name."""
    return lambda value: {target: value}


def mapped(target: str, values: Mapping[Any, Any]) -> Reader:
    """Our value for each foreign value; None: it changes nothing. Other values are passed on unchanged."""

    def read(value: Any) -> dict[str, Any]:
        our_value = values.get(value, value) if isinstance(value, (str, int, float)) else value
        return {} if our_value is None else {target: our_value}

    return read


def flag(if_true: dict[str, Any], if_false: dict[str, Any], target: str) -> Reader:
    """Settings for true and for false; any other value is passed on to `target`, where it is an error."""
    return lambda value: (if_true if value else if_false) if isinstance(value, bool) else {target: value}


def targets(value: Any) -> dict[str, Any]:
    """PEFT's target_modules, LLaMA-Factory's `all`, and comma-separated names."""
    if isinstance(value, str) and value in ("all", "all-linear"):
        return {"adapter.targets": "all-linear"}
    if isinstance(value, str) and all(name.strip().isidentifier() for name in value.split(",")):
        return {"adapter.targets": [name.strip() for name in value.split(",")]}
    return {"adapter.targets": value}


def datasets(target: str) -> Reader:
    """Axolotl's list of {path, type}: its `type` is our `format`."""
    formats = {"alpaca": "alpaca", "chat_template": "auto", "completion": "text", "sharegpt": "sharegpt"}

    def dataset(value: Any) -> Any:
        if not isinstance(value, Mapping) or "type" not in value:
            return value
        kind = value["type"]
        others = {key: item for key, item in value.items() if key != "type"}
        return {**others, "format": formats.get(kind, kind) if isinstance(kind, str) else kind}

    return lambda value: {target: [dataset(item) for item in value] if isinstance(value, list) else value}


def trackers(value: Any) -> dict[str, Any]:
    """One tracker, a list of them, or `none`."""
    return {"train.report_to": ([] if value == "none" else [value]) if isinstance(value, str) else value}


def adapter_kind(value: Any) -> dict[str, Any]:
    """Axolotl's `adapter: qlora`, or one of our kinds."""
    if value not in ("lora", "qlora"):
        return {"adapter.kind": value}
    quant = {"quant.kind?": ("nf4", "fp4")} if value == "qlora" else {}
    return {"adapter.kind?": ("lora", "rslora", "dora"), **quant}


_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_DTYPES |= {f"torch.{name}": name for name in ("bfloat16", "float16", "float32")}
_OPTIMIZERS = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw"}
_OPTIMIZERS |= {"adamw_bnb_8bit": "adamw_8bit", "paged_adamw": "paged_adamw_32bit"}
_OFFLOADED = {"memory.recompute": "all", "memory.offload_activations": True}

SAME_VALUE = {  # our name: foreign names of the same value
    "model.name": ("base_model", "model_name_or_path"),
    "model.revision": ("model_revision", "revision_of_model"),
    "model.attention": ("attn_implementation",),
    "quant.kind": ("bnb_4bit_quant_type",),
    "quant.double": ("bnb_4bit_use_double_quant", "use_bnb_nested_quant", "double_quantization"),
    "adapter.rank": ("lora_r", "lora_rank"),
    "adapter.alpha": ("lora_alpha",),
    "adapter.dropout": ("lora_dropout",),
    "adapter.save_modules": ("modules_to_save", "lora_modules_to_save"),
    "adapter.rank_pattern": ("rank_pattern",),
    "adapter.alpha_pattern": ("alpha_pattern",),
    "data.train": ("dataset", "dataset_name", "dataset_path"),
    "data.eval_fraction": ("val_set_size", "val_size", "test_split_size"),
    "data.max_length": ("sequence_len", "cutoff_len", "max_seq_length", "max_seq_len", "max_length"),
    "data.packing": ("sample_packing", "packing"),
    "optim.learning_rate": ("learning_rate", "lr"),
    "optim.warmup": ("warmup_steps",),
    "optim.weight_decay": ("weight_decay",),
    "optim.max_grad_norm": ("max_grad_norm",),
    "optim.loraplus_ratio": ("loraplus_lr_ratio", "loraplus_ratio"),
    "train.output": ("output_dir",),
    "train.epochs": ("num_train_epochs", "num_epochs"),
    "train.micro_batch": ("per_device_train_batch_size", "micro_batch_size"),
    "train.global_batch": ("global_batch_size",),
    ACCUMULATION: ("gradient_accumulation_steps",),
    "train.seed": ("seed",),
    "train.log_every": ("logging_steps",),
    "train.eval_every": ("eval_steps",),
    "train.save_every": ("save_steps",),
    "train.keep": ("save_total_limit",),
    "train.early_stop": ("early_stopping_patience",),
    "memory.offload_activations": ("activation_offloading",),
}

_four_bit = flag({"quant.kind?": ("nf4", "fp4")}, {"quant.kind": "dense"}, "quant.kind")
_rslora, _dora = (flag({"adapter.kind": kind}, {}, "adapter.kind") for kind in ("rslora", "dora"))
_init = mapped("adapter.init", {True: "default"})
_optimizer = mapped("optim.kind", _OPTIMIZERS)
_schedule = mapped("optim.schedule", {"constant_with_warmup": "constant"})
_train_on_all = flag({"data.train_on": "all"}, {"data.train_on": "assistant"}, "data.train_on")
_resume = mapped("train.resume", {True: "auto", False: "never"})


def _recompute(value: Any) -> dict[str, Any]:
    if value in ("unsloth", "offload"):
        return dict(_OFFLOADED)
    return mapped("memory.recompute", {True: "all", False: "none"})(value)


ALIASES: Mapping[str, Reader] = {name: same_value(target) for target, names in SAME_VALUE.items() for name in names} | {
    "torch_dtype": mapped("model.dtype", _DTYPES),
    "bf16": flag({"model.dtype?": ("bfloat16",)}, {}, "model.dtype"),
    "fp16": flag({"model.dtype?": ("float16",)}, {}, "model.dtype"),
    "bnb_4bit_compute_dtype": lambda value: {"model.dtype?": (_DTYPES.get(str(value), value),)},
    "flash_attention": flag({"model.attention": "flash_attention_2"}, {}, "model.attention"),
    "chat_template": mapped("model.chat_template", {"tokenizer_default": "auto"}),
    "chat_template_path": same_value("model.chat_template"),
    "load_in_4bit": _four_bit,
    "load_in_8bit": flag({"quant.kind": "int8"}, {}, "quant.kind"),
    "quantization_bit": lambda value: _four_bit(True) if value == 4 else {"quant.kind": value},
    "lora_target_modules": targets,
    "target_modules": targets,
    "lora_target": targets,
    "lora_target_linear": flag({"adapter.targets": "all-linear"}, {}, "adapter.targets"),
    "use_rslora": _rslora,
    "peft_use_rslora": _rslora,
    "use_dora": _dora,
    "peft_use_dora": _dora,
    "init_lora_weights": _init,
    "peft_init_lora_weights": _init,
    "datasets": datasets("data.train"),
    "test_datasets": datasets("data.eval"),
    "train_on_inputs": _train_on_all,
    "train_on_prompt": _train_on_all,
    "assistant_only_loss": flag({"data.train_on": "assistant"}, {"data.train_on": "all"}, "data.train_on"),
    "optimizer": _optimizer,
    "lr_scheduler_type": _schedule,
    "lr_scheduler": _schedule,
    "warmup_ratio": lambda value: {"optim.warmup": float(value) if type(value) is int and abs(value) < 2 else value},
    "max_steps": mapped("train.max_steps", {-1: None}),
    "report_to": trackers,
    "resume_from_checkpoint": _resume,
    "auto_resume_from_checkpoints": _resume,
    "gradient_checkpointing": _recompute,
    "activation_checkpointing": _recompute,
    **PREFERENCE_ALIASES,
}

SECTION_KINDS: Mapping[str, Reader] = {  # `section: text` is the section's kind
    "adapter": adapter_kind,
    "distributed": same_value("distributed.kind"),
    "optim": _optimizer,
    "quant": same_value("quant.kind"),
}

REMEDIES: Mapping[str, str] = {  # known names without a setting here, and what to write
    **PREFERENCE_REMEDIES,
    "adam_beta1": "Write optim.betas: [beta1, beta2].",
    "adam_beta2": "Write optim.betas: [beta1, beta2].",
    "deepspeed": "Processes and sharding come from accelerate launch; see recipes/accelerate.",
    "fsdp": "Write distributed.kind: fsdp, and start with accelerate launch.",
    "fsdp_config": "Sharding comes from accelerate launch; see recipes/accelerate.",
    "group_by_length": "Write data.packing: true, which leaves no padding; or packing: false and data.order: length.",
    "trust_remote_code": "Code of a repository is never run. Remove it.",
    "use_wandb": "Write train.report_to: [wandb].",
    "wandb_project": "Write train.report_to: [wandb], and set WANDB_PROJECT.",
}


RENAMED_VALUES: Mapping[str, Mapping[str, str]] = {"optim.kind": RENAMED_OPTIMIZERS}  # former values of our settings


def translate(name: str, value: Any) -> dict[str, Any] | None:
    """Our keys and values for a top-level name of a recipe; None if the name is no alias."""
    if name in SECTION_KINDS and isinstance(value, str):
        return SECTION_KINDS[name](value)
    if name not in ALIASES:
        return None
    return {} if value is None else ALIASES[name](value)


def target_keys(name: str) -> list[str]:
    """Our keys that an alias may set; none if it is no alias."""
    settings = ALIASES[name](True) or ALIASES[name](False) if name in ALIASES else {}
    return [key.removesuffix("?") for key in settings if key != ACCUMULATION]
