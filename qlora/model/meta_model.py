"""The model on `meta`: transformers' classes without weights, names of checkpoint keys, and the tokenizer.

Nothing of transformers is patched, and no remote code runs.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import logging as transformers_logging

from qlora.errors import BaseModelError
from qlora.model.attention import DOCUMENT_ATTENTION
from qlora.model.limits import check_buffer_sizes, check_config_sizes

transformers_logging.set_verbosity_error()

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def read_config(folder: Path) -> Any:
    """The model's configuration. BaseModelError if it is damaged, needs remote code, or has experts."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a damaged file can raise anything in transformers
        raise BaseModelError(f"model: {folder / 'config.json'}: {_first_line(error)}") from error
    check_config_sizes(config.to_dict())
    experts = _experts(config.to_dict())
    if experts:
        raise BaseModelError(
            f"model: {folder} is a mixture of experts ({experts}), which can't be trained yet. Choose a dense model."
        )
    return config


def build_meta_model(config: Any, dtype: torch.dtype, attention: str, device: torch.device) -> nn.Module:
    """The model with every parameter on `meta` and every buffer computed on `device`; evaluation mode, no gradients."""
    try:
        with torch.device("meta"):
            model = _from_config(config, dtype, DOCUMENT_ATTENTION if attention == "auto" else attention)
            if attention == "auto" and not model._supports_sdpa:  # Gemma 2 soft-caps its scores, which needs "eager"
                model = _from_config(config, dtype, "eager")
    except Exception as error:  # impossible sizes can raise anything in the first layer
        raise BaseModelError(f"model: config.json can't be built as a model: {_first_line(error)}") from error
    model.requires_grad_(False)
    check_buffer_sizes(model)
    _fill_buffers(model, device)
    return model.eval()  # type: ignore[no-any-return]


def _experts(config: Mapping[str, Any]) -> str | None:
    """The key that counts experts, at any depth, if there is more than one expert."""
    for key, value in config.items():
        if isinstance(value, Mapping) and (nested := _experts(value)):
            return nested
        if key in EXPERT_COUNTS and isinstance(value, int) and value > 1:
            return key
    return None


def _from_config(config: Any, dtype: torch.dtype, attention: str) -> Any:
    return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, attn_implementation=attention)


def _fill_buffers(model: nn.Module, device: torch.device) -> None:
    """Allocate buffers (rotary frequencies, embedding scales) on `device` and let transformers compute them."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device=device)
        module._is_hf_initialized = False  # type: ignore[assignment]
    model.initialize_weights()  # type: ignore[operator]


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


def linear_paths(model: nn.Module) -> list[str]:
    """Paths of the decoder's linear layers in order, without the output head: what is quantized and adapted."""
    decoder = model.get_decoder()  # type: ignore[operator]
    linears = {id(module) for module in decoder.modules() if isinstance(module, nn.Linear)}
    return [path for path, module in model.named_modules() if id(module) in linears]


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of the folder. BaseModelError if it is missing or needs remote code."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise BaseModelError(f"model: {folder} has no tokenizer that can be read: {_first_line(error)}") from error


def stop_ids(config: Any, generation: Mapping[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """Token ids that end an answer: those of generation_config.json, of config.json and of the tokenizer."""
    stops: set[int] = set()
    for ids in (generation.get("eos_token_id"), config.get_text_config().eos_token_id, tokenizer.eos_token_id):
        stops |= {token for token in (ids if isinstance(ids, list | tuple) else [ids]) if isinstance(token, int)}
    return tuple(sorted(stops))


def _first_line(error: Exception) -> str:
    """The first line of an error's message; the second too if the first ends in a colon."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
