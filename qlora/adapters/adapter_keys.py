"""Tensor names of an adapter file: sorted by what they are, and read where a wrapper of the model has changed them.

PEFT writes `base_model.model.{path}.lora_A.weight`. torch.compile, DDP, FSDP and state dicts saved by hand leave parts
of their own in a name, which are no modules: reading without them is safe, as every path must exist in the base.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from qlora.adapters.peft_fields import MERGE_IN_PEFT
from qlora.adapters.trainable_tokens import TENSOR_SUFFIX
from qlora.errors import AdapterError

PREFIX = "base_model.model."
SUFFIXES = {"A": ".lora_A.weight", "B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
EMBEDDING_SUFFIXES = {"embedding A": ".lora_embedding_A", "embedding B": ".lora_embedding_B"}
# PEFT writes it beside LoRA or trained rows of the embedding and the head.
BASE_WEIGHTS = (".token_adapter.base_layer.weight", ".base_layer.weight")
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # of torch.compile and FSDP
ADAPTED = re.compile(
    r"(.+\.(?:lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector))"
    r"(?:\.(?!weight$|bias$)([^.]+))?(?:\.weight)?"
)
SAVED = ".modules_to_save."  # after a change of the vocabulary PEFT writes a module to save three times
IGNORED = re.compile(r".+\.original_module\..+|.+\.lora_velora_embed")  # the base's own; used in backward only


@dataclass
class AdapterTensors:
    """The tensors of an adapter file by module path, and a line about names that were changed."""

    sides: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # path -> A [R, I], B [O, R], magnitude [O]
    embeddings: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # path -> A [R, V], B [I, R]
    base_weights: dict[str, Tensor] = field(default_factory=dict)  # path -> W of an adapted embedding or head
    modules: dict[str, Tensor] = field(default_factory=dict)  # name -> weight that replaces the base's
    rows: dict[str, Tensor] = field(default_factory=dict)  # path -> trained rows [N, I]
    note: str | None = None


def sort_tensors(named: Mapping[str, Tensor], saved: tuple[str, ...], path: Path) -> AdapterTensors:
    """Sort the tensors of the file at `path`; `saved`: names of its modules_to_save.

    AdapterError for a tensor that can't be read, by what it is, and for two names of one tensor.
    """
    plain = _plain_names([key for key in named if not IGNORED.fullmatch(key)], path)
    tensors = AdapterTensors()
    empty = next((key for key in plain if not named[key].numel()), None)
    if empty:
        raise AdapterError(
            f"{path}: {empty!r} is empty: it was saved before DeepSpeed's ZeRO-3 had gathered its shards. Save it with "
            "stage3_gather_16bit_weights_on_model_save: true, or rebuild it from the checkpoint by zero_to_fp32.py."
        )
    for key, name in plain.items():
        _add(tensors, name.removeprefix(PREFIX), key, named[key], saved, path)
    changed = [(key, name) for key, name in plain.items() if key != name]
    if changed:
        key, name = changed[0]
        tensors.note = f"{path}: {len(changed)} tensors have other names than PEFT's: {key} is read as {name}"
    return tensors


def refuse_incomplete(tensors: AdapterTensors, uses_dora: bool, path: Path) -> None:
    """AdapterError unless the file at `path` has an A and a B for each layer and, for DoRA, a magnitude."""
    magnitude = {"magnitude"} if uses_dora else set[str]()
    expected = {layer: {"A", "B"} | magnitude for layer in tensors.sides.keys() - tensors.embeddings.keys()}
    expected |= {layer: EMBEDDING_SUFFIXES.keys() | magnitude for layer in tensors.embeddings}
    for layer, sides in sorted(expected.items()):
        stored = tensors.sides.get(layer, {}).keys() | tensors.embeddings.get(layer, {}).keys()
        if stored != sides:
            names = ", ".join((SUFFIXES | EMBEDDING_SUFFIXES)[side].split(".")[1] for side in sorted(sides))
            raise AdapterError(f"{path}: {layer} must have exactly {names}, as its adapter_config.json says.")
    if not expected:
        raise AdapterError(f"{path}: found no lora_A and lora_B, allowed: those of one layer or more.")


def _add(tensors: AdapterTensors, name: str, key: str, value: Tensor, saved: tuple[str, ...], path: Path) -> None:
    for suffixes, layers in ((SUFFIXES, tensors.sides), (EMBEDDING_SUFFIXES, tensors.embeddings)):
        for side, suffix in suffixes.items():
            if name.endswith(suffix):
                layers.setdefault(name.removesuffix(suffix), {})[side] = value
                return
    if saved and name.rpartition(".")[0].endswith(saved):
        tensors.modules[name] = value
    elif name.endswith(TENSOR_SUFFIX):
        tensors.rows[name.removesuffix(TENSOR_SUFFIX)] = value
    elif name.endswith(BASE_WEIGHTS):
        suffix = next(suffix for suffix in BASE_WEIGHTS if name.endswith(suffix))
        tensors.base_weights[name.removesuffix(suffix)] = value
    elif name.endswith(".weight") and "lora_" not in name:
        tensors.modules[name] = value  # after a change of the vocabulary PEFT writes embedding and head by itself
    else:
        raise AdapterError(f"{path}: {key!r} {_description(name)}")


def _plain_names(keys: Sequence[str], path: Path) -> dict[str, str]:
    """Keys of a file with their names in PEFT's format."""
    adapters = {match[2] for key in keys if (match := ADAPTED.fullmatch(key)) and match[2]}
    if len(adapters) > 1:
        raise AdapterError(
            f"{path}: found tensors of {len(adapters)} adapters ({', '.join(sorted(adapters)[:3])}), allowed: one. "
            "Save each in a folder of its own: save_pretrained(FOLDER, selected_adapters=[NAME])."
        )
    keys = [key for key in keys if SAVED not in key or key.replace(SAVED, ".") not in keys]
    plain = {key: _plain_name(key) for key in keys}
    other = {name: key for key, name in plain.items()}
    twice = next((key for key, name in plain.items() if other[name] != key), None)
    if twice:
        raise AdapterError(f"{path}: {twice!r} and {other[plain[twice]]!r} name one tensor. Remove one of them.")
    return plain


def _plain_name(key: str) -> str:
    """A tensor's name without what wrappers of the model and the adapter's own name add to it."""
    match = ADAPTED.fullmatch(key)
    if match:
        key = match[1] + (".weight" if match[1].endswith(("lora_A", "lora_B")) else "")
    parts = [part for part in key.replace(SAVED, ".").split(".") if part not in WRAPPERS]
    while parts[0] == "module":
        del parts[0]
    name = ".".join(parts)
    return name if name.startswith(PREFIX) else PREFIX + name


def _description(name: str) -> str:
    """What a tensor is that can't be read, and what to do."""
    if name.endswith(".bias"):
        return (
            f"is a bias that was trained (bias: all or lora_only, or lora_bias), which can't be read. {MERGE_IN_PEFT}"
        )
    if ".lora_E" in name or "ranknum" in name:
        return f"belongs to AdaLoRA, which can't be read. {MERGE_IN_PEFT}"
    return f"does not belong to LoRA or DoRA; only these can be read. {MERGE_IN_PEFT}"
