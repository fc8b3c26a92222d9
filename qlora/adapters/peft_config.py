"""PEFT's adapter_config.json: read and check it, build it for an adapter, look up a module's rank and alpha."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from qlora.adapters.dora import Dora
from qlora.adapters.expert_keys import name_in_patterns
from qlora.adapters.expert_lora import ExpertLora
from qlora.adapters.inject import adapted, adapted_experts
from qlora.adapters.lora import Lora, LoraLinear
from qlora.adapters.modules_to_save import names_for_peft
from qlora.adapters.peft_fields import MERGE_IN_PEFT, refuse_fields
from qlora.adapters.peft_starts import changed_start
from qlora.adapters.peft_targets import pattern_fields, plain_number, target_names, target_parameters
from qlora.adapters.rslora import RsLora
from qlora.adapters.trainable_tokens import trainable_token_indices
from qlora.errors import AdapterError
from qlora.utils.atomic_files import read_json
from qlora.utils.name_patterns import matches
from qlora.utils.sandbox import LimitExceeded, within_limits

MAX_RANK = 65_536
MAX_PATTERN_LENGTH = 500  # characters of a key of rank_pattern or alpha_pattern
PEFT_ALPHA = 8  # PEFT's default of lora_alpha
PEFT_FIELDS: Mapping[str, Any] = {  # the fields that every PEFT since 0.10 knows, with their values here
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": None, "bias": "none", "fan_in_fan_out": False,
    "inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_alpha": None, "lora_dropout": 0.0, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "r": None, "rank_pattern": {},
    "revision": None, "target_modules": None, "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
}  # fmt: skip
LAYER_FILTERS = ("layers_to_transform", "layers_pattern", "exclude_modules")  # narrow what target_modules matches


def read_config(path: Path) -> dict[str, Any]:
    """The settings of an adapter_config.json. AdapterError if it is damaged or of an adapter that is not supported."""
    try:
        config = read_json(path)
    except ValueError as error:
        raise AdapterError(f"{path} is not a JSON object: {error}") from error
    if config.get("peft_type") != "LORA":
        kind = str(config.get("peft_type"))[:80]
        raise AdapterError(f"{path}: peft_type: found {kind!r}, allowed: LORA. {MERGE_IN_PEFT}")
    refuse_fields(path, config)
    changed_start(path, config)
    _check_patterns(path, config)
    _check_values(path, config)
    return config


def build_config(model: nn.Module, adapter: Lora, name: str, revision: str | None) -> dict[str, Any]:
    """The adapter_config.json of a model's adapter; `name` and `revision` are those of its base."""
    layers: list[LoraLinear | ExpertLora] = [*adapted(model).values(), *adapted_experts(model).values()]
    stored = adapter.with_rank_times(layers[0].pair()[1].shape[-1] // layers[0].rank)
    token_indices, parameters = trainable_token_indices(model), target_parameters(model)
    return (
        dict(PEFT_FIELDS)
        | pattern_fields(model, stored)
        | {
            "base_model_name_or_path": name,
            "lora_alpha": plain_number(stored.alpha),
            "lora_dropout": 0.0 if parameters else adapter.dropout,  # PEFT loads no target parameters with dropout
            "modules_to_save": names_for_peft(model),
            "r": stored.rank,
            "revision": revision,
            "target_modules": target_names(model),
            **({"target_parameters": parameters} if parameters else {}),
            **({"trainable_token_indices": token_indices} if token_indices else {}),
            "use_dora": isinstance(adapter, Dora),
            "use_rslora": isinstance(adapter, RsLora),
        }
    )


def build_plain_config(
    source: Mapping[str, Any], rank: int, targets: Mapping[str, Any], ranks: Mapping[str, int]
) -> dict[str, Any]:
    """The adapter_config.json of a plain LoRA with a scaling of 1; base, revision and dropout are those of `source`.

    targets: the fields that name the adapted matrices; ranks: of experts that have another one.
    """
    return dict(PEFT_FIELDS) | {
        "alpha_pattern": dict(ranks),
        "base_model_name_or_path": source.get("base_model_name_or_path"),
        "lora_alpha": rank,
        "lora_dropout": float(source.get("lora_dropout") or 0.0),
        "r": rank,
        "rank_pattern": dict(ranks),
        "revision": source.get("revision"),
        **targets,
    }


def plain_fields(rank: int) -> dict[str, Any]:
    """The fields of a config that give every layer this rank and a scaling of 1, on an unchanged base."""
    fields = {"alpha_pattern": {}, "rank_pattern": {}, "use_rslora": False, "init_lora_weights": True}
    return fields | {"lora_alpha": rank, "r": rank}


def has_layer_filter(config: Mapping[str, Any]) -> bool:
    """Whether the config adapts fewer layers than `target_modules` matches."""
    return any(config.get(key) for key in LAYER_FILTERS)


def module_settings(config: Mapping[str, Any], path: str, rank: int) -> Lora:
    """Kind, rank and alpha of one module, with the config's patterns applied."""
    alphas, name = config.get("alpha_pattern") or {}, name_in_patterns(config, path)
    alpha = _by_pattern_in_time(alphas, name, config.get("lora_alpha", PEFT_ALPHA))
    kind = RsLora if config.get("use_rslora") else Lora
    return kind(rank=rank, alpha=float(alpha), dropout=float(config.get("lora_dropout") or 0.0))


def possible_ranks(config: Mapping[str, Any], path: str) -> set[int]:
    """The ranks that the config allows for one module: of every key that matches, as PEFT sorts them when it saves."""
    ranks = [config.get("r"), *_matching(config.get("rank_pattern") or {}, name_in_patterns(config, path)).values()]
    return {rank for rank in ranks if type(rank) is int}


def rank_of(config: Mapping[str, Any], stack: str) -> int:
    """The rank of each expert's update in a stack: of the first key that matches. AdapterError without one."""
    rank = _by_pattern_in_time(config.get("rank_pattern") or {}, stack, config.get("r"))
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise AdapterError(f"adapter_config.json: r: found {rank!r}, allowed: a whole number from 1.")
    return rank


def report_unclear_alphas(where: Path, config: Mapping[str, Any], paths: Iterable[str]) -> Iterator[str]:
    """A line if the order of alpha_pattern decides about a layer: PEFT writes its keys in alphabetical order.

    The order of training, in which the first key that matches counts, is in no file.
    """
    patterns = config.get("alpha_pattern") or {}
    if len(patterns) < 2 or list(patterns) != sorted(patterns):
        return
    for path in dict.fromkeys(name_in_patterns(config, path) for path in paths):
        alphas = _matching(patterns, path)
        if len(set(alphas.values())) > 1:
            keys = ", ".join(f"{key!r} ({alpha})" for key, alpha in alphas.items())
            yield (
                f"careful: {where}: alpha_pattern: {keys} match {path}; the first counts. PEFT sorts them when it "
                "saves: if training had another order, correct it in the file."
            )
            return


def _by_pattern_in_time(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """`by_pattern`, for expressions of an untrusted file. AdapterError for one that takes too long."""
    return next(iter(_matching(patterns, path).values()), default)


def _matching(patterns: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The patterns whose key matches `path`. AdapterError for an expression that takes too long."""
    return {key: patterns[key] for key in _matching_keys(tuple(patterns), path)} if patterns else {}


@lru_cache(maxsize=4096)  # the experts of a stack ask for the same
def _matching_keys(keys: tuple[str, ...], path: str) -> tuple[str, ...]:
    try:
        return within_limits(lambda: tuple(key for key in keys if matches(key, path)))
    except (LimitExceeded, MemoryError):
        raise AdapterError(
            f"adapter_config.json: rank_pattern or alpha_pattern: an expression takes too long to match {path!r}."
        ) from None


def _check_patterns(path: Path, config: Mapping[str, Any]) -> None:
    """AdapterError unless rank_pattern and alpha_pattern map expressions to a rank, or to some value."""
    alphas, ranks = (config.get(key) or {} for key in ("alpha_pattern", "rank_pattern"))
    for key, patterns in (("alpha_pattern", alphas), ("rank_pattern", ranks)):
        if not isinstance(patterns, dict) or not all(_is_expression(expression) for expression in patterns):
            raise AdapterError(f"{path}: {key} must map expressions for module names to numbers.")
    if not all(type(rank) is int and 1 <= rank <= MAX_RANK for rank in ranks.values()):
        raise AdapterError(f"{path}: rank_pattern: found {str(ranks)[:80]}, allowed: whole numbers from 1.")


def _check_values(path: Path, config: Mapping[str, Any]) -> None:
    """AdapterError unless every alpha, the modules to save and the dropout have allowed values."""
    for alpha in (config.get("lora_alpha", PEFT_ALPHA), *(config.get("alpha_pattern") or {}).values()):
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
            raise AdapterError(f"{path}: lora_alpha: found {alpha!r}, allowed: a number above 0.")
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise AdapterError(f"{path}: modules_to_save must be a list of names.")
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise AdapterError(f"{path}: lora_dropout: found {dropout!r}, allowed: a number from 0 to below 1.")


def _is_expression(key: Any) -> bool:
    try:
        return isinstance(key, str) and len(key) < MAX_PATTERN_LENGTH and re.compile(rf"(?:.*\.)?(?:{key})") is not None
    except (re.error, OverflowError, RecursionError):
        return False
