"""The model's code without its weights, and its tokenizer.  Door: transformers.

Transformers' own classes and weight renamings are used; nothing of theirs is patched, and no remote code is run.
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
from qlora.model.attention import NAME
from qlora.model.limits import refuse_giant_buffers, refuse_giants

transformers_logging.set_verbosity_error()

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def read_config(folder: Path) -> Any:
    """The model's configuration. BaseModelError for one that is damaged, needs remote code, or has experts."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a broken file makes transformers raise
        raise BaseModelError(f"model: {folder / 'config.json'}: {_first_line(error)}") from error
    refuse_giants(config.to_dict())
    experts = _experts(config.to_dict())
    if experts:
        raise BaseModelError(
            f"model: {folder} is a mixture of experts ({experts}); these can't be trained yet. Take a dense model."
        )
    return config


def build(config: Any, dtype: torch.dtype, attention: str, device: torch.device) -> nn.Module:
    """The model with every parameter on `meta` and every buffer computed on `device`; evaluation mode, no gradients."""
    try:
        with torch.device("meta"):
            model = _from_config(config, dtype, NAME if attention == "auto" else attention)
            if attention == "auto" and not model._supports_sdpa:  # Gemma 2 caps its scores, which no kernel here does
                model = _from_config(config, dtype, "eager")
    except Exception as error:  # sizes that make no model raise whatever the first layer trips over
        raise BaseModelError(f"model: config.json makes no model: {_first_line(error)}") from error
    model.requires_grad_(False)
    refuse_giant_buffers(model)
    _fill_buffers(model, device)
    return model.eval()  # type: ignore[no-any-return]


def _experts(config: Mapping[str, Any]) -> str | None:
    """The key that counts experts, at any depth, if there is more than one."""
    for key, value in config.items():
        if isinstance(value, Mapping) and (found := _experts(value)):
            return found
        if key in EXPERT_COUNTS and isinstance(value, int) and value > 1:
            return key
    return None


def _from_config(config: Any, dtype: torch.dtype, attention: str) -> Any:
    return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, attn_implementation=attention)


def _fill_buffers(model: nn.Module, device: torch.device) -> None:
    """Give buffers (rotary frequencies, embedding scales) memory, and let transformers compute them again."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device=device)
        module._is_hf_initialized = False  # type: ignore[assignment]
    model.initialize_weights()  # type: ignore[operator]


def renamer(model: nn.Module, folder: Path) -> Callable[[str], str]:
    """A function from a key in the files to the name of the model's parameter, by transformers' own conversions."""
    transforms = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    wanted = model.state_dict()

    def rename(key: str) -> str:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)  # type: ignore[arg-type]
        if converted:
            raise BaseModelError(f"model: {folder}: {key!r} is stored in a layout that can't be read yet.")
        return str(name)

    return rename


def linear_paths(model: nn.Module) -> list[str]:
    """Paths of the decoder's linear layers in order, the output head left out: what is quantised and adapted."""
    decoder = model.get_decoder()  # type: ignore[operator]
    inside = {id(module) for module in decoder.modules() if isinstance(module, nn.Linear)}
    return [path for path, module in model.named_modules() if id(module) in inside]


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of the folder. BaseModelError if there is none that needs no remote code."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise BaseModelError(f"model: {folder} has no tokenizer that can be read: {_first_line(error)}") from error


def stop_ids(config: Any, generation: Mapping[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """Token ids that end an answer: those of generation_config.json, of config.json and of the tokenizer."""
    found: set[int] = set()
    for ids in (generation.get("eos_token_id"), config.get_text_config().eos_token_id, tokenizer.eos_token_id):
        found |= {token for token in (ids if isinstance(ids, list | tuple) else [ids]) if isinstance(token, int)}
    return tuple(sorted(found))


def _first_line(error: Exception) -> str:
    """What an error says in one line; the next one too where the first only introduces it."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
