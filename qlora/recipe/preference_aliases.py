"""Aliases of preference tuning: names of TRL (DPO, KTO, ORPO, CPO), Axolotl and LLaMA-Factory -> `objective`.

Readers and tables are as in aliases.py. TRL's script says which trainer a file is for, the file does not: a setting
that only some objectives have picks the first of them, unless the recipe names another that has it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from qlora.training.objectives import READ_BY

_LOSSES = {"sigmoid": "dpo"}  # of DPOTrainer, and LLaMA-Factory's pref_loss; other names are ours or unknown here
_KEYS: Mapping[str, str] = {  # foreign name -> our key
    "beta": "beta",
    "dpo_beta": "beta",
    "rl_beta": "beta",
    "pref_beta": "beta",
    "orpo_alpha": "beta",
    "label_smoothing": "label_smoothing",
    "dpo_label_smoothing": "label_smoothing",
    "simpo_gamma": "gamma",
    "desirable_weight": "desirable_weight",
    "kto_desirable_weight": "desirable_weight",
    "kto_chosen_weight": "desirable_weight",
    "undesirable_weight": "undesirable_weight",
    "kto_undesirable_weight": "undesirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "rpo_alpha": "sft_weight",
    "cpo_alpha": "sft_weight",
    "pref_ftx": "sft_weight",
    "ref_model_adapters": "reference",
}
_FIRST = {"orpo_alpha": ("orpo",), "cpo_alpha": ("simpo",)}  # names that only one trainer has


def _reader(name: str, key: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {f"objective.{key}": value, "objective.kind?": _FIRST.get(name, READ_BY[key])}


def _loss(value: Any) -> dict[str, Any]:
    """One loss, or TRL's list of one."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return {"objective.kind": _LOSSES.get(value, value) if isinstance(value, str) else value}


def _stage(value: Any) -> dict[str, Any]:
    """LLaMA-Factory's stage; its pref_loss may name another loss for pairs."""
    kinds = ("dpo", "ipo", "orpo", "simpo")
    return {"objective.kind?": kinds} if value == "dpo" else {"objective.kind": value}


PREFERENCE_ALIASES: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    **{name: _reader(name, key) for name, key in _KEYS.items()},
    "loss_type": _loss,
    "pref_loss": _loss,
    "rl": lambda value: {"objective.kind": value},
    "stage": _stage,
}

_ONE_REFERENCE = "The reference is the adapter switched off, or objective.reference. Remove it."
_WHOLE = "A pair is trained whole or dropped by data.max_length, prompt and both answers together. Remove it."
PREFERENCE_REMEDIES: Mapping[str, str] = {  # names without a setting here, and what to write
    "loss_weights": "Write objective.kind, and objective.sft_weight for the weight of TRL's loss sft.",
    "f_divergence_type": "Only the reverse KL divergence is offered. Remove it.",
    "f_alpha_divergence_coef": "Only the reverse KL divergence is offered. Remove it.",
    "ld_alpha": "Every token of an answer has the same weight. Remove it.",
    "use_weighting": "Every pair has the same weight. Remove it.",
    "discopop_tau": "The loss discopop is not offered. Write objective.kind: dpo.",
    "alpha": "AlphaPO is not offered. Write objective.kind: simpo.",
    "sync_ref_model": "The reference does not change. Remove it.",
    "ref_model_mixup_alpha": "The reference does not change. Remove it.",
    "ref_model_sync_steps": "The reference does not change. Remove it.",
    "ref_model": _ONE_REFERENCE,
    "precompute_ref_log_probs": _ONE_REFERENCE,
    "precompute_ref_batch_size": _ONE_REFERENCE,
    "max_prompt_length": _WHOLE,
    "max_completion_length": _WHOLE,
    "truncation_mode": _WHOLE,
    "generate_during_eval": "Write train.sample_prompts, or use `qlora generate` after the run.",
    "disable_dropout": "Write adapter.dropout: 0; the reference never has dropout.",
    "router_aux_loss_coef": "The router is frozen. Remove it.",
    "is_encoder_decoder": "Models are decoders. Remove it.",
    "model_init_kwargs": "Write its keys in `model`.",
    "padding_free": "Write data.packing: true.",
    "pad_to_multiple_of": "Padding is known by position. Remove it.",
    "padding_value": "Padding is known by position. Remove it.",
    "pad_token": "Padding is known by position. Remove it.",
}
