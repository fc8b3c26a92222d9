"""The model on `meta`: transformers' classes without weights, and the tokenizer.

Nothing of transformers is patched, and no remote code runs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from qlora.errors import BaseModelError, first_line
from qlora.model.attention import DOCUMENT_ATTENTION
from qlora.model.buffers import compute_buffers
from qlora.model.expert_forward import replace_experts
from qlora.model.limits import check_buffer_sizes, check_config_sizes
from qlora.model.tied_head import stores_own_head
from qlora.model.wrapper_models import build_class

transformers_logging.set_verbosity_error()

TOKENIZER = "It needs tokenizer.json and tokenizer_config.json, or tokenizer.model: fetch the folder again"


def read_config(folder: Path) -> Any:
    """The model's configuration; a head that the files store apart from the embedding is not tied to it.

    BaseModelError if it is damaged or needs remote code.
    """
    config = _load_config(folder)
    check_config_sizes(config.to_dict())
    if _unties_head(config, folder):
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    return config


def unties_head(folder: Path) -> bool:
    """Whether config.json ties the head to the embedding, but the files hold another head, which is used then."""
    return _unties_head(_load_config(folder), folder)


def _unties_head(config: Any, folder: Path) -> bool:
    text = config.get_text_config()
    is_tied = getattr(text, "tie_word_embeddings", getattr(config, "tie_word_embeddings", False))
    return bool(is_tied) and stores_own_head(folder)


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
        replace_experts(model)
    except BaseModelError:
        raise
    except Exception as error:  # impossible sizes can raise anything in the first layer
        raise BaseModelError(f"model: config.json can't be built as a model: {first_line(error)}") from error
    return model.eval()  # type: ignore[no-any-return]


def _with_attention(config: Any, dtype: torch.dtype, attention: str) -> Any:
    if attention != "auto":
        return build_class(config, dtype, attention)
    try:
        model = build_class(config, dtype, DOCUMENT_ATTENTION)
    except KeyError as error:
        if error.args != (DOCUMENT_ATTENTION,):
            raise
        return _from_known_kernels(config, dtype)  # Falcon picks a module by the kernel's name
    # Gemma 2 soft-caps its scores, which needs "eager"; SDPA has no sinks, DOCUMENT_ATTENTION has (gpt-oss).
    has_sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
    return model if model._supports_sdpa or has_sinks else build_class(config, dtype, "eager")


def _from_known_kernels(config: Any, dtype: torch.dtype) -> Any:
    try:
        return build_class(config, dtype, "sdpa")
    except ValueError:  # not every class has it
        return build_class(config, dtype, "eager")


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
