"""Shapes of a base model from its config.json, without weights, torch or transformers."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from qlora.errors import BaseModelError
from qlora.memory.planner.architectures import FAMILIES, SAME, TEXT_CLASSES, TIED, WRAPPERS
from qlora.memory.planner.config_values import ConfigValues
from qlora.memory.planner.layer_parts import decoder_layer, layer_input_width
from qlora.memory.planner.layer_types import layer_count, layer_parts
from qlora.memory.planner.shapes import OTHER_INPUT, Layer, Matrix, ModelFlags, Shapes
from qlora.memory.planner.towers import tower_values
from qlora.model.limits import check_config_sizes
from qlora.model.tied_head import stores_own_head


def read(folder: Path, name: str | None = None) -> Shapes:
    """The shapes of the model in `folder` (or of a config.json file). BaseModelError if they can't be read."""
    path = folder if folder.is_file() else folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(f"model: {path} can't be read: {error}. A model's config.json is needed.") from error
    if not isinstance(config, dict):
        raise BaseModelError(f"model: {path} is not a JSON object. A model's config.json is needed.")
    return shapes_of(config, name or str(folder), stores_own_head(path.parent))


def shapes_of(config: Mapping[str, Any], name: str, own_head: bool = False) -> Shapes:
    """The shapes of a parsed config.json. BaseModelError, with the key, for unknown models and invalid values.

    `own_head`: the model's files hold a head that differs from the embedding, whatever config.json says.
    """
    check_config_sizes(config)
    model_type, text = _text_model(config, name)
    family = FAMILIES.get(SAME.get(model_type, model_type))
    if family is None:
        raise BaseModelError(
            f"model: {name}: config.json: the planner does not know the shapes of model_type {model_type!r}, so there "
            f"is no memory plan; a run recomputes every layer then.{_nearest(model_type)}"
        )
    return _shapes(ConfigValues(config, text, family, name), own_head)


def _nearest(model_type: str) -> str:
    """` Did you mean 'qwen3_moe'?`, if a known family is near."""
    near = get_close_matches(model_type, {**FAMILIES, **SAME, **WRAPPERS}, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _text_model(config: Mapping[str, Any], name: str) -> tuple[str, Mapping[str, Any]]:
    """The model_type and the configuration of the text model; of a wrapper they are in `text_config`."""
    model_type = str(config.get("model_type"))
    if model_type not in WRAPPERS and not isinstance(config.get("text_config"), Mapping):
        return model_type, config
    text = config.get("text_config") or {}
    if not isinstance(text, Mapping):
        raise BaseModelError(f"model: {name}: config.json: text_config is {text!r}; a JSON object is needed.")
    return str(text.get("model_type") or WRAPPERS.get(model_type, model_type)), text


def _shapes(config: ConfigValues, own_head: bool) -> Shapes:
    """The shapes of the text model, and how much a wrapper's checkpoint holds besides."""
    family, hidden = config.family, config.size("hidden_size")
    kinds, order = _kinds(config)
    path = family.layers_path
    if config.is_wrapped and config.config.get("model_type") not in TEXT_CLASSES:
        path = path.replace("model.", "model.language_model.", 1)
    root = path.rpartition(".")[0]
    width = layer_input_width(config)
    outside, others = _outside(config, root, width, len(order))
    tied = _is_tied(config) and not own_head
    vocabulary = config.size("vocab_size")
    return Shapes(
        name=config.name,
        flags=_flags(config),
        dtype=config.dtype(),
        vocabulary=vocabulary,
        hidden=hidden,
        tied=tied,
        kinds=kinds,
        order=order,
        layers_path=path,
        others=others + (vocabulary if config.enabled(family.head_bias) else 0),
        outside=outside,
        layer_table=config.size("vocab_size_per_layer_input") * width * len(order) if width else 0,
        stored_only=tower_values(config.config, hidden),
    )


def _kinds(config: ConfigValues) -> tuple[tuple[Layer, ...], tuple[int, ...]]:
    """The kinds of decoder layers, and the kind of each layer."""
    kinds: dict[str, Layer] = {}
    order: list[int] = []
    layers = layer_count(config)
    for index, parts in enumerate(layer_parts(config, layers)):
        layer = decoder_layer(config, index, *parts)
        kinds.setdefault(repr(layer), layer)
        order.append([*kinds].index(repr(layer)))
    return tuple(kinds.values()), tuple(order)


def _outside(config: ConfigValues, root: str, width: int, layers: int) -> tuple[tuple[Matrix, ...], int]:
    """Quantized matrices of the decoder outside of its layers, and 16-bit values there (Gemma 3n and 4)."""
    hidden, matrices = config.size("hidden_size"), []
    if width:
        matrices.append(Matrix(f"{root}.per_layer_model_projection", layers * width, hidden, False, OTHER_INPUT))
    if config.family.alternating:
        names = ("altup_projections", "altup_unembed_projections")
        numbers = range(config.size("altup_num_inputs") - 1)
        matrices += [
            Matrix(f"{root}.{name}.{number}", hidden, hidden, False, OTHER_INPUT)
            for name in names
            for number in numbers
        ]
    return tuple(matrices), width


def _is_tied(config: ConfigValues) -> bool:
    """Whether the LM head is tied to the embedding; of a wrapper its own key counts, not its text model's."""
    if config.is_wrapped:
        value = config.config.get("tie_word_embeddings")
        return config.config.get("model_type") in TIED if value is None else bool(value)
    return bool(config.get("tie_embedding", "tie_word_embeddings"))  # LFM2 has its own key


def _flags(config: ConfigValues) -> ModelFlags:
    family = config.family
    return ModelFlags(
        layer_norm=family.layer_norm,
        flat_norms=family.flat_norms,
        fused=family.fused,
        joined_rotary=family.joined_rotary,
        softcap=family.softcap,
        scaled=family.scaled,
        final_softcap=config.enabled(family.final_softcap),
        attention=family.attention,
        embedding=family.embedding,
        last_norm=family.last_norm,
    )
