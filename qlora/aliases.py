"""Names of other trainers' settings -> ours: what TRL, Axolotl, LLaMA-Factory and Unsloth users know reads here.

A reader takes the foreign value and gives `{our key: our value}`; nothing where the foreign value asks for nothing.
A key that ends in `?` is weak: its tuple starts with what it means, and it gives way to anything else in the tuple.
"""

from collections.abc import Callable, Mapping
from typing import Any

Reader = Callable[[Any], dict[str, Any]]

ACCUMULATION = "train.accumulation"  # no setting: with train.micro_batch it gives train.global_batch


def to(target: str) -> Reader:
    """The same value under our name."""
    return lambda value: {target: value}


def words(target: str, meanings: Mapping[Any, Any]) -> Reader:
    """Our value for each of the foreign ones; others are passed on as they are; None asks for nothing."""

    def read(value: Any) -> dict[str, Any]:
        ours = meanings.get(value, value) if isinstance(value, (str, int, float)) else value
        return {} if ours is None else {target: ours}

    return read


def flag(yes: dict[str, Any], no: dict[str, Any], target: str) -> Reader:
    """What true and false ask for; anything else is passed on to `target`, where it is an error."""
    return lambda value: (yes if value else no) if isinstance(value, bool) else {target: value}


def targets(value: Any) -> dict[str, Any]:
    """PEFT's target_modules, LLaMA-Factory's `all`, and names between commas."""
    if isinstance(value, str) and value in ("all", "all-linear"):
        return {"adapter.targets": "all-linear"}
    if isinstance(value, str) and all(part.strip().isidentifier() for part in value.split(",")):
        return {"adapter.targets": [part.strip() for part in value.split(",")]}
    return {"adapter.targets": value}


def sets(target: str) -> Reader:
    """Axolotl's list of {path, type}: its `type` is our `format`."""
    formats = {"alpaca": "alpaca", "chat_template": "auto", "completion": "text", "sharegpt": "sharegpt"}

    def one(value: Any) -> Any:
        if not isinstance(value, Mapping) or "type" not in value:
            return value
        kind = value["type"]
        others = {key: each for key, each in value.items() if key != "type"}
        return {**others, "format": formats.get(kind, kind) if isinstance(kind, str) else kind}

    return lambda value: {target: [one(each) for each in value] if isinstance(value, list) else value}


def trackers(value: Any) -> dict[str, Any]:
    """One tracker, a list of them, or `none`."""
    return {"train.report_to": ([] if value == "none" else [value]) if isinstance(value, str) else value}


def kind(value: Any) -> dict[str, Any]:
    """Axolotl's `adapter: qlora`, or one of our kinds."""
    if value not in ("lora", "qlora"):
        return {"adapter.kind": value}
    base = {"quant.kind?": ("nf4", "fp4")} if value == "qlora" else {}
    return {"adapter.kind?": ("lora", "rslora", "dora"), **base}


_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_DTYPES |= {f"torch.{name}": name for name in ("bfloat16", "float16", "float32")}
_OPTIMIZERS = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw"}
_OPTIMIZERS |= {"adamw_bnb_8bit": "adamw_8bit", "paged_adamw": "paged_adamw_32bit"}
_OFFLOADED = {"memory.recompute": "all", "memory.offload_activations": True}

_name, _length, _targets, _ratio = to("model.name"), to("data.max_length"), targets, to("optim.loraplus_ratio")
_four_bit = flag({"quant.kind?": ("nf4", "fp4")}, {"quant.kind": "dense"}, "quant.kind")
_double, _micro_batch, _held_out = to("quant.double"), to("train.micro_batch"), to("data.eval_fraction")
_rslora, _dora = (flag({"adapter.kind": kind}, {}, "adapter.kind") for kind in ("rslora", "dora"))
_dtype, _optimizer = words("model.dtype", _DTYPES), words("optim.kind", _OPTIMIZERS)
_schedule = words("optim.schedule", {"constant_with_warmup": "constant"})
_mask = flag({"data.train_on": "all"}, {"data.train_on": "assistant"}, "data.train_on")


def _recompute(value: Any) -> dict[str, Any]:
    if value in ("unsloth", "offload"):
        return dict(_OFFLOADED)
    return words("memory.recompute", {True: "all", False: "none"})(value)


ALIASES: Mapping[str, Reader] = {
    # the base
    "base_model": _name,
    "model_name_or_path": _name,
    "model_revision": to("model.revision"),
    "revision_of_model": to("model.revision"),
    "torch_dtype": _dtype,
    "bf16": flag({"model.dtype?": ("bfloat16",)}, {}, "model.dtype"),
    "fp16": flag({"model.dtype?": ("float16",)}, {}, "model.dtype"),
    "attn_implementation": to("model.attention"),
    "flash_attention": flag({"model.attention": "flash_attention_2"}, {}, "model.attention"),
    "chat_template": words("model.chat_template", {"tokenizer_default": "auto"}),
    "chat_template_path": to("model.chat_template"),
    # how it is stored
    "load_in_4bit": _four_bit,
    "load_in_8bit": flag({"quant.kind": "int8"}, {}, "quant.kind"),
    "quantization_bit": lambda value: _four_bit(True) if value == 4 else {"quant.kind": value},
    "bnb_4bit_quant_type": to("quant.kind"),
    "bnb_4bit_use_double_quant": _double,
    "use_bnb_nested_quant": _double,
    "double_quantization": _double,
    "bnb_4bit_compute_dtype": lambda value: {"model.dtype?": (_DTYPES.get(str(value), value),)},
    # the adapter
    "lora_r": to("adapter.rank"),
    "lora_rank": to("adapter.rank"),
    "lora_alpha": to("adapter.alpha"),
    "lora_dropout": to("adapter.dropout"),
    "lora_target_modules": _targets,
    "target_modules": _targets,
    "lora_target": _targets,
    "lora_target_linear": flag({"adapter.targets": "all-linear"}, {}, "adapter.targets"),
    "use_rslora": _rslora,
    "peft_use_rslora": _rslora,
    "use_dora": _dora,
    "peft_use_dora": _dora,
    "init_lora_weights": words("adapter.init", {True: "default"}),
    "peft_init_lora_weights": words("adapter.init", {True: "default"}),
    "loraplus_lr_ratio": _ratio,
    "loraplus_ratio": _ratio,
    # the data
    "dataset": to("data.train"),
    "dataset_name": to("data.train"),
    "dataset_path": to("data.train"),
    "datasets": sets("data.train"),
    "test_datasets": sets("data.eval"),
    "val_set_size": _held_out,
    "val_size": _held_out,
    "test_split_size": _held_out,
    "sequence_len": _length,
    "cutoff_len": _length,
    "max_seq_length": _length,
    "max_seq_len": _length,
    "max_length": _length,
    "sample_packing": to("data.packing"),
    "packing": to("data.packing"),
    "train_on_inputs": _mask,
    "train_on_prompt": _mask,
    "assistant_only_loss": flag({"data.train_on": "assistant"}, {"data.train_on": "all"}, "data.train_on"),
    # how the weights move
    "optimizer": _optimizer,
    "learning_rate": to("optim.learning_rate"),
    "lr": to("optim.learning_rate"),
    "lr_scheduler_type": _schedule,
    "lr_scheduler": _schedule,
    "warmup_ratio": lambda value: {"optim.warmup": float(value) if type(value) is int and abs(value) < 2 else value},
    "warmup_steps": to("optim.warmup"),
    "weight_decay": to("optim.weight_decay"),
    "max_grad_norm": words("optim.max_grad_norm", {}),
    # the run
    "output_dir": to("train.output"),
    "num_train_epochs": to("train.epochs"),
    "num_epochs": to("train.epochs"),
    "max_steps": words("train.max_steps", {-1: None}),
    "per_device_train_batch_size": _micro_batch,
    "micro_batch_size": _micro_batch,
    "gradient_accumulation_steps": to(ACCUMULATION),
    "global_batch_size": to("train.global_batch"),
    "seed": to("train.seed"),
    "logging_steps": to("train.log_every"),
    "eval_steps": to("train.eval_every"),
    "save_steps": to("train.save_every"),
    "save_total_limit": to("train.keep"),
    "early_stopping_patience": to("train.early_stop"),
    "report_to": trackers,
    "resume_from_checkpoint": words("train.resume", {True: "auto", False: "never"}),
    "auto_resume_from_checkpoints": words("train.resume", {True: "auto", False: "never"}),
    # memory
    "gradient_checkpointing": _recompute,
    "activation_checkpointing": _recompute,
    "activation_offloading": to("memory.offload_activations"),
}

SECTION_WORDS: Mapping[str, Reader] = {  # a section's name with a text: its kind
    "adapter": kind,
    "distributed": to("distributed.kind"),
    "optim": _optimizer,
    "quant": to("quant.kind"),
}

REMEDIES: Mapping[str, str] = {  # names that people know and that have no counterpart
    "adam_beta1": "Write optim.betas: [beta1, beta2].",
    "adam_beta2": "Write optim.betas: [beta1, beta2].",
    "deepspeed": "Processes and sharding come from accelerate launch; see recipes/accelerate.",
    "fsdp": "Write distributed.kind: fsdp, and start with accelerate launch.",
    "fsdp_config": "Sharding comes from accelerate launch; see recipes/accelerate.",
    "group_by_length": "Write data.packing: true, which leaves no padding at all.",
    "trust_remote_code": "Code of a repository is never run. Remove it.",
    "use_wandb": "Write train.report_to: [wandb].",
    "wandb_project": "Write train.report_to: [wandb], and set WANDB_PROJECT.",
}


def meaning(name: str, value: Any) -> dict[str, Any] | None:
    """Our keys and values for a name at the top of a recipe; None if the name is no alias."""
    if name in SECTION_WORDS and isinstance(value, str):
        return SECTION_WORDS[name](value)
    if name not in ALIASES:
        return None
    return {} if value is None else ALIASES[name](value)


def counterparts(name: str) -> list[str]:
    """Our keys that an alias may set; none if it is no alias."""
    found = ALIASES[name](True) or ALIASES[name](False) if name in ALIASES else {}
    return [key.removesuffix("?") for key in found if key != ACCUMULATION]
