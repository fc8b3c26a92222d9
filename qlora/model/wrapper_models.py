"""Wrapper models: the class whose text model trains, and the vision and audio towers around it, which are not built.

A checkpoint such as Gemma 4 or Mistral 3 is a text model with towers. The class that transformers builds for it keeps
its names, so that adapters and merged weights have the checkpoint's own; its towers become None.
"""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from qlora.errors import BaseModelError, first_line
from qlora.model.module_tree import decoder_of

_TOWER_MODULES = "_qlora_tower_modules"


def build_class(config: Any, dtype: Any, attention: str) -> Any:
    """The model of a configuration, without towers: AutoModelForCausalLM's class, else the one for images and text."""
    factory = getattr(transformers, factory_name(config))
    model = factory.from_config(config, dtype=dtype, trust_remote_code=False, attn_implementation=attention)
    if model.config.get_text_config() is not model.config:
        _remove_towers(model)
    return model


def factory_name(config: Any) -> str:
    """The class of transformers that loads the checkpoint: AutoModelForCausalLM, or the one for images and text."""
    is_causal = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM.__name__ if is_causal else AutoModelForImageTextToText.__name__


def build_whole_class(config: Any, name: str | None = None) -> nn.Module:
    """The class called `name` on `meta`, with its towers; None: the one that `factory_name` builds.

    BaseModelError if transformers has no such class, or can't build it for this configuration.
    """
    factory = getattr(transformers, name or factory_name(config), None)
    build = getattr(factory, "from_config" if name is None else "_from_config", None)
    if build is None:
        raise BaseModelError(f"config.json: architectures: transformers {transformers.__version__} has no {name!r}.")
    try:
        with torch.device("meta"):
            return build(config, dtype=torch.float32, attn_implementation="eager").eval()  # type: ignore[no-any-return]
    except Exception as error:  # a class of another configuration can raise anything
        raise BaseModelError(
            f"config.json: {name or factory_name(config)} can't be built: {first_line(error)}"
        ) from error


def _remove_towers(model: Any) -> None:
    """Set to None every module with parameters that is beside the text decoder, the embedding and the head."""
    kept = [decoder_of(model), model.get_input_embeddings(), model.get_output_embeddings()]
    before = [path for path, _ in model.named_modules()]
    _remove_beside(model, [module for module in kept if module is not None])
    left = {path for path, _ in model.named_modules()}
    setattr(model, _TOWER_MODULES, tuple(path for path in before if path not in left))


def tower_modules(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules of towers, which are not built here but in the class that other programs load."""
    return getattr(model, _TOWER_MODULES, ())


def _remove_beside(parent: nn.Module, kept: list[nn.Module]) -> None:
    for name, child in list(parent.named_children()):
        inside = set(child.modules())
        if child in kept:
            continue
        if any(module in inside for module in kept):
            _remove_beside(child, kept)
        elif any(True for _ in child.parameters()):
            setattr(parent, name, None)
