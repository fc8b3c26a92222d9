"""Fields of PEFT's LoraConfig in one table: applied, without effect on what an adapter computes, or refused in use.

A field is in use if its value is neither null, false nor empty, and not PEFT's default. Fields that are in no table are
reported if they are in use: they are of a newer PEFT, or of another tool.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora.errors import AdapterError

APPLIED = frozenset({
    "alpha_pattern", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern",
    "revision", "target_modules", "target_parameters", "trainable_token_indices", "use_dora", "use_rslora",
})  # fmt: skip
WITHOUT_EFFECT = frozenset({
    "auto_mapping", "inference_mode", "lora_dropout", "megatron_core", "peft_version", "runtime_config", "task_type",
    "corda_config", "eva_config", "loftq_config", "lora_ga_config",  # settings of a start; init_lora_weights names it
    "fan_in_fan_out",  # PEFT sets it to false for linear layers, the only ones that are adapted here
    "qalora_group_size",  # of use_qalora
    "velora_config",  # memory of backward
})  # fmt: skip
REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": "the adapter acts only after certain tokens",
    "arrow_config": "a router chooses between adapters",
    "kasa_config": "its start removed the smallest singular values from the base's weights",
    "layer_replication": "layers of the base are used more than once",
    "lora_bias": "B has a bias",
    "megatron_config": "the adapted layers are Megatron's",
    "monteclora_config": "A and B are drawn at random",
    "use_bdlora": "A and B are stored as blocks",
    "use_qalora": "A acts on means of the input's groups",
}  # fmt: skip
DEFAULTS: Mapping[str, Any] = {"megatron_core": "megatron.core", "qalora_group_size": 16}  # that are not empty
MERGE_IN_PEFT = "Merge it in PEFT (merge_and_unload) and use the merged model."
SHOWN = 60  # characters of a value


def refuse_fields(path: Path, config: Mapping[str, Any]) -> None:
    """AdapterError for a field in use that changes what the adapter computes, in a way that is not implemented."""
    for key, reason in REFUSED.items():
        if _is_in_use(key, config.get(key)):
            raise AdapterError(f"{path}: {key} is not supported: {reason}. {MERGE_IN_PEFT}")


def report_unknown_fields(path: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """A line that names the unknown fields in use, if there are any."""
    known = APPLIED | WITHOUT_EFFECT | REFUSED.keys()
    unknown = {key: value for key, value in config.items() if key not in known and _is_in_use(key, value)}
    if unknown:
        listed = ", ".join(f"{key} ({json.dumps(value)[:SHOWN]})" for key, value in sorted(unknown.items()))
        yield (
            f"careful: {path}: unknown settings are ignored: {listed}. If they change what the adapter computes, the "
            "results are wrong: compare them with those of the tool that wrote the file."
        )


def _is_in_use(key: str, value: Any) -> bool:
    return bool(value) and value != DEFAULTS.get(key)
