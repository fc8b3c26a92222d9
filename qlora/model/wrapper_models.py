"""Wrapper models: the class whose text model trains, and the vision and audio towers around it, which are not built.

A checkpoint such as Gemma 4 or Mistral 3 is a text model with towers. The class that transformers builds for it keeps
its names, so that adapters and merged weights have the checkpoint's own; its towers become None.
"""

from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from qlora.model.module_tree import decoder_of


def build_class(config: Any, dtype: Any, attention: str) -> Any:
    """The model of a configuration, without towers: AutoModelForCausalLM's class, else the one for images and text."""
    is_causal = type(config) in AutoModelForCausalLM._model_mapping
    factory = AutoModelForCausalLM if is_causal else AutoModelForImageTextToText
    model = factory.from_config(config, dtype=dtype, trust_remote_code=False, attn_implementation=attention)
    if model.config.get_text_config() is not model.config:
        _remove_towers(model)
    return model


def _remove_towers(model: Any) -> None:
    """Set to None every module with parameters that is beside the text decoder, the embedding and the head."""
    kept = [decoder_of(model), model.get_input_embeddings(), model.get_output_embeddings()]
    _remove_beside(model, [module for module in kept if module is not None])


def _remove_beside(parent: nn.Module, kept: list[nn.Module]) -> None:
    for name, child in list(parent.named_children()):
        inside = set(child.modules())
        if child in kept:
            continue
        if any(module in inside for module in kept):
            _remove_beside(child, kept)
        elif any(True for _ in child.parameters()):
            setattr(parent, name, None)
