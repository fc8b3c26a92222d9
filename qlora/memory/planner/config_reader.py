"""Shapes of a base model from its config.json, without weights, torch or transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora.errors import BaseModelError, did_you_mean
from qlora.memory.planner.architectures import FAMILIES, NESTED, SIGLIP, ConfigSwitch, Family
from qlora.memory.planner.shapes import ATTENTION_INPUT, ATTENTION_OUTPUT, MLP_HIDDEN, MLP_INPUT, Matrix, Shapes
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
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(NESTED.get(model_type, model_type))
    if family is None:
        raise BaseModelError(
            f"model: {name}: config.json: the planner does not know the shapes of model_type {model_type!r}."
            f"{did_you_mean(model_type, [*FAMILIES, *NESTED])}"
        )
    return _Reader(config, family, name, own_head).shapes()


class _Reader:
    """One config.json; missing keys of its text model have the family's defaults."""

    def __init__(self, config: Mapping[str, Any], family: Family, name: str, own_head: bool) -> None:
        self.config, self.family, self.name, self.own_head = config, family, name, own_head
        self.nested = config["model_type"] in NESTED
        text = self.section("text_config") if self.nested else config
        self.text = {**family.defaults, **text}

    def shapes(self) -> Shapes:
        """The shapes of the whole model."""
        hidden, heads = self.size("hidden_size"), self.size("num_attention_heads")
        kv_heads, head_dim = self.size("num_key_value_heads", heads), self.size("head_dim", hidden // heads)
        path = self.family.layers_path
        return Shapes(
            name=self.name,
            family=self.family,
            dtype=self.dtype(),
            vocabulary=self.size("vocab_size"),
            hidden=hidden,
            intermediate=self.size("intermediate_size"),
            layers=self.size("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            tied=self.tied(),
            block=self.block(hidden, heads * head_dim, kv_heads * head_dim),
            layers_path=path.replace("model.", "model.language_model.", 1) if self.nested else path,
            parallel=self.family.layer_norm and bool(self.text.get("use_parallel_residual", True)),
            window=self.window(),
            vision=self.vision(hidden) if self.nested else 0,
        )

    def section(self, key: str) -> Mapping[str, Any]:
        """A nested configuration; empty if it is missing."""
        section = self.config.get(key) or {}
        if not isinstance(section, Mapping):
            raise BaseModelError(f"model: {self.name}: config.json: {key} is {section!r}; a JSON object is needed.")
        return section

    def size(self, key: str, default: int | None = None, of: Mapping[str, Any] | None = None) -> int:
        """A positive integer; the default if it is missing or null."""
        value = (self.text if of is None else of).get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise BaseModelError(f"model: {self.name}: config.json: {key} is {value!r}; a positive integer is needed.")
        return value

    def enabled(self, switch: ConfigSwitch) -> bool:
        """The value of a switch for this model."""
        return bool(self.text.get(switch)) if isinstance(switch, str) else switch

    def tied(self) -> bool:
        """Whether the LM head is tied to the embedding."""
        tied = (self.config if self.nested else self.text).get("tie_word_embeddings")
        tied = bool(self.family.defaults.get("tie_word_embeddings") if tied is None else tied)
        return tied and not self.own_head

    def window(self) -> int | None:
        """The sliding window in tokens, if the model uses one."""
        used = self.enabled(self.family.window) and self.text.get("sliding_window") is not None
        return self.size("sliding_window") if used else None

    def dtype(self) -> str | None:
        """`bfloat16` and the like: transformers 5 writes `dtype`, earlier versions `torch_dtype`."""
        pairs = [(config, key) for config in (self.text, self.config) for key in ("dtype", "torch_dtype")]
        return next((str(config[key]).removeprefix("torch.") for config, key in pairs if config.get(key)), None)

    def block(self, hidden: int, query: int, key_value: int) -> tuple[Matrix, ...]:
        """The linear layers of one decoder layer, in the model's order."""
        family, mlp = self.family, self.size("intermediate_size")
        outputs = [query, key_value, key_value, hidden, mlp, mlp, hidden]
        if family.fused:
            outputs = [query + 2 * key_value, hidden, 2 * mlp if family.gated else mlp, hidden]
        qkv, up = (1, 1) if family.fused else (3, 2)
        inputs = (
            *(qkv * [(ATTENTION_INPUT, hidden, family.attention, family.qkv_bias)]),
            (ATTENTION_OUTPUT, query, family.attention, family.output_bias),
            *(up * [(MLP_INPUT, hidden, "mlp", family.mlp_bias)]),
            (MLP_HIDDEN, mlp, "mlp", family.mlp_bias),
        )
        return tuple(
            Matrix(f"{module}.{name}", out_features, in_features, self.enabled(bias), reads)
            for name, out_features, (reads, in_features, module, bias) in zip(
                family.names, outputs, inputs, strict=True
            )
        )

    def vision(self, hidden: int) -> int:
        """Parameters of a SigLIP tower (arXiv:2303.15343) and of its projector."""
        tower = {**SIGLIP, **self.section("vision_config")}
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "patch_size", "image_size", "num_channels")
        wide, mlp, layers, patch, image, channels = (self.size(key, of=tower) for key in keys)
        attention, perceptron, norm = 4 * wide * (wide + 1), 2 * wide * mlp + mlp + wide, 2 * wide
        embeddings = wide * (channels * patch**2 + 1 + (image // patch) ** 2)
        pooling = attention + perceptron + norm + wide if tower["vision_use_head"] else 0
        projector = wide * hidden + wide
        return embeddings + layers * (attention + perceptron + 2 * norm) + norm + pooling + projector
