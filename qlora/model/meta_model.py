"""The model on `meta`: transformers' classes without weights, names of checkpoint keys, and the tokenizer.

Nothing of transformers is patched, and no remote code runs.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import logging as transformers_logging

from qlora.errors import BaseModelError, first_line
from qlora.model.attention import DOCUMENT_ATTENTION
from qlora.model.buffers import compute_buffers
from qlora.model.limits import check_buffer_sizes, check_config_sizes
from qlora.model.tied_head import stores_own_head

transformers_logging.set_verbosity_error()

TOKENIZER = "It needs tokenizer.json and tokenizer_config.json, or tokenizer.model: fetch the folder again"
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def read_config(folder: Path) -> Any:
    """The model's configuration; a head that the files store apart from the embedding is not tied to it.

    BaseModelError if it is damaged, needs remote code, or has experts.
    """
    config = _load_config(folder)
    check_config_sizes(config.to_dict())
    experts = _experts(config.to_dict())
    if experts:
        raise BaseModelError(
            f"model: {folder} is a mixture of experts ({experts}), which can't be trained yet. Choose a dense model."
        )
    if _unties_head(config, folder):
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    return config


def unties_head(folder: Path) -> bool:
    """Whether config.json ties the head to the embedding, but the files hold another head, which is used then."""
    return _unties_head(_load_config(folder), folder)


def _unties_head(config: Any, folder: Path) -> bool:
    return bool(config.get_text_config().tie_word_embeddings) and stores_own_head(folder)


def _load_config(folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config.get_text_config()  # a model of several text models has none
        return config
    except Exception as error:  # a damaged file can raise anything in transformers
        raise BaseModelError(f"model: {folder / 'config.json'}: {first_line(error)}") from error


def build_meta_model(config: Any, dtype: torch.dtype, attention: str, device: torch.device) -> nn.Module:
    """The model with every parameter on `meta` and every buffer computed on `device`; evaluation mode, no gradients.

    `attention`: auto takes DOCUMENT_ATTENTION where the class takes kernels by name, else SDPA, else eager.
    """
    try:
        with torch.device("meta"):
            model = _with_attention(config, dtype, attention)
        model.requires_grad_(False)
        check_buffer_sizes(model)
        compute_buffers(model, device)
    except BaseModelError:
        raise
    except Exception as error:  # impossible sizes can raise anything in the first layer
        raise BaseModelError(f"model: config.json can't be built as a model: {first_line(error)}") from error
    return model.eval()  # type: ignore[no-any-return]


def _experts(config: Mapping[str, Any]) -> str | None:
    """The key that counts experts, at any depth, if there is more than one expert."""
    for key, value in config.items():
        if isinstance(value, Mapping) and (nested := _experts(value)):
            return nested
        if key in EXPERT_COUNTS and isinstance(value, int) and value > 1:
            return key
    return None


def _with_attention(config: Any, dtype: torch.dtype, attention: str) -> Any:
    if attention != "auto":
        return _from_config(config, dtype, attention)
    try:
        model = _from_config(config, dtype, DOCUMENT_ATTENTION)
    except KeyError as error:
        if error.args != (DOCUMENT_ATTENTION,):
            raise
        return _from_known_kernels(config, dtype)  # Falcon picks a module by the kernel's name
    # Gemma 2 soft-caps its scores, which needs "eager".
    return model if model._supports_sdpa else _from_config(config, dtype, "eager")


def _from_known_kernels(config: Any, dtype: torch.dtype) -> Any:
    try:
        return _from_config(config, dtype, "sdpa")
    except ValueError:  # not every class has it
        return _from_config(config, dtype, "eager")


def _from_config(config: Any, dtype: torch.dtype, attention: str) -> Any:
    return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, attn_implementation=attention)


def key_renamer(model: nn.Module, folder: Path) -> Callable[[str], str]:
    """A function from a checkpoint key to the name of the model's parameter, by transformers' conversion mapping."""
    transforms = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    parameters = model.state_dict()

    def rename(key: str) -> str:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)  # type: ignore[arg-type]
        if converted:
            raise BaseModelError(f"model: {folder}: {key!r} is stored in a layout that can't be read yet.")
        return str(name)

    return rename


def names_by_key(model: nn.Module, folder: Path, keys: Iterable[str]) -> dict[str, str]:
    """Checkpoint key -> name of its tensor in the model.

    A tied head that is stored as well is left out; one that is stored alone is the embedding it is tied to.
    """
    rename = key_renamer(model, folder)
    tied = dict(model.all_tied_weights_keys)  # type: ignore[arg-type]
    renamed = {key: rename(key) for key in keys}
    stored = set(renamed.values())
    names: dict[str, str] = {}
    for key, name in renamed.items():
        source = tied.get(name)
        if source is None:
            names[key] = name
        elif source not in stored:
            names[key] = source
            stored.add(source)
    return names


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of the folder. BaseModelError if it is missing or needs remote code."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, ImportError, AttributeError) as error:
        problem = f"model: {folder} has no tokenizer that can be read: {first_line(error).rstrip('.')}. {TOKENIZER}."
        raise BaseModelError(problem) from error


def stop_ids(config: Any, generation: Mapping[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """Token ids that end an answer: those of generation_config.json, of config.json and of the tokenizer."""
    stops: set[int] = set()
    configured = getattr(config.get_text_config(), "eos_token_id", None)
    for ids in (generation.get("eos_token_id"), configured, tokenizer.eos_token_id):
        stops |= {token for token in (ids if isinstance(ids, list | tuple) else [ids]) if isinstance(token, int)}
    return tuple(sorted(stops))
