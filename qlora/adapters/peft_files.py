"""An adapter folder in PEFT's file format, written and read.  Door: safetensors.

Every file carries the fingerprint of its base in the safetensors header, where PEFT and the servers ignore it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from qlora.adapters.dora import DoraLinear
from qlora.adapters.inject import adapted
from qlora.adapters.lora import Lora
from qlora.adapters.modules_to_save import weights_to_save
from qlora.adapters.peft_config import build_config, read_config
from qlora.adapters.trainable_tokens import TENSOR_SUFFIX, token_rows
from qlora.errors import AdapterError, QloraError
from qlora.utils.atomic_files import write_bytes, write_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
SUFFIXES = {"A": ".lora_A.weight", "B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
FINGERPRINT = "qlora.base_sha256"


@dataclass(frozen=True)
class BaseIdentity:
    """Which base an adapter belongs to: name and commit as the user knows them, fingerprint of its weights."""

    name: str
    revision: str | None
    sha256: str


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder as read: settings, tensors by module path, and the base's fingerprint if it carries one."""

    folder: Path
    config: Mapping[str, Any]
    pairs: Mapping[str, tuple[Tensor, Tensor]]  # path -> (A [R, I], B [O, R])
    base_sha256: str | None
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)  # path -> m [O]; of DoRA, for every pair
    modules: Mapping[str, Tensor] = field(default_factory=dict)  # name -> weight of a module to save
    rows: Mapping[str, Tensor] = field(default_factory=dict)  # path -> trained rows [N, I] of embedding or head


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names: `base_model.model.{path}.lora_A.weight` [R, I] and `.lora_B` [O, R].

    DoRA has a `.lora_magnitude_vector` [O] as well; modules to save keep their own names.
    """
    named: dict[str, Tensor] = {}
    for path, layer in adapted(model).items():
        a, b = layer.pair()
        named[PREFIX + path + SUFFIXES["A"]] = a.detach()
        named[PREFIX + path + SUFFIXES["B"]] = b.detach()
        if isinstance(layer, DoraLinear):
            named[PREFIX + path + SUFFIXES["magnitude"]] = layer.magnitude.detach()
    named |= {PREFIX + path + TENSOR_SUFFIX: module.rows.detach() for path, module in token_rows(model).items()}
    return named | {PREFIX + name: value.detach() for name, value in weights_to_save(model)}


@torch.no_grad()
def load_tensors(model: nn.Module, named: Mapping[str, Tensor]) -> None:
    """Overwrite the adapters of `model`, in place, by what `tensors` returned for it."""
    for path, layer in adapted(model).items():
        layer.load_pair(named[PREFIX + path + SUFFIXES["A"]], named[PREFIX + path + SUFFIXES["B"]])
        if isinstance(layer, DoraLinear):
            layer.magnitude.copy_(named[PREFIX + path + SUFFIXES["magnitude"]])
    for name, value in weights_to_save(model):
        value.copy_(named[PREFIX + name])
    for path, module in token_rows(model).items():
        module.rows.copy_(named[PREFIX + path + TENSOR_SUFFIX])


def write(folder: Path, model: nn.Module, adapter: Lora, base: BaseIdentity) -> None:
    """Write adapter_model.safetensors and adapter_config.json, as PEFT reads them.

    QloraError, and nothing is written, if a value is not finite.
    """
    named = {key: value.cpu().contiguous() for key, value in tensors(model).items()}
    refuse_non_finite(named, folder / WEIGHTS)
    write_bytes(folder / WEIGHTS, serialize(named, {FINGERPRINT: base.sha256}))
    write_json(folder / CONFIG, build_config(model, adapter, base.name, base.revision))


def refuse_non_finite(named: Mapping[str, Tensor], path: Path) -> None:
    """QloraError, naming the tensor, if one that is to be written to `path` has a NaN or an infinity."""
    for key, value in named.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise QloraError(
                f"{path}: {key} has a value that is not finite; nothing was written. "
                "Lower optim.learning_rate, and resume from the newest checkpoint."
            )


def serialize(named: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file in memory, its header marked as PyTorch's; the same tensors are the same bytes."""
    addresses: set[int] = set()
    separate = {}  # a tied tensor is written under each of its names
    for key, value in named.items():
        separate[key] = value.clone() if value.data_ptr() in addresses else value
        addresses.add(value.data_ptr())
    content = save(separate, metadata={"format": "pt", **(metadata or {})})
    size = int.from_bytes(content[:8], "little")
    # The library writes its header's entries in random order.
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. AdapterError if it is missing or damaged."""
    return _read_safetensors(path)[0]


def read(folder: Path) -> AdapterFile:
    """Read an adapter folder of qlora or PEFT. AdapterError if it is damaged, or neither LoRA nor DoRA."""
    _require(folder / CONFIG)
    config = read_config(folder / CONFIG)
    named, metadata = _read_safetensors(folder / WEIGHTS)
    modules = {key.removeprefix(PREFIX): value for key, value in named.items() if _is_module_to_save(key, config)}
    rows = {key[len(PREFIX) : -len(TENSOR_SUFFIX)]: v for key, v in named.items() if key.endswith(TENSOR_SUFFIX)}
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in named.items():
        if key.removeprefix(PREFIX) not in modules and not key.endswith(TENSOR_SUFFIX):
            path, side = _split(key, folder)
            layers.setdefault(path, {})[side] = value
    needed = set(SUFFIXES) if config.get("use_dora") else {"A", "B"}
    incomplete = next((path for path, sides in layers.items() if sides.keys() != needed), None)
    if incomplete or not layers:
        names = ", ".join(SUFFIXES[side].split(".")[1] for side in sorted(needed))
        raise AdapterError(
            f"{folder / WEIGHTS}: {incomplete or 'the file'} must have exactly {names}, as its {CONFIG} says."
        )
    pairs = {path: (sides["A"], sides["B"]) for path, sides in layers.items()}
    magnitudes = {path: sides["magnitude"] for path, sides in layers.items() if "magnitude" in sides}
    return AdapterFile(folder, config, pairs, metadata.get(FINGERPRINT), magnitudes, modules, rows)


def _is_module_to_save(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a key is a weight of one of `modules_to_save`, which PEFT matches as ends of paths; or tied to one."""
    names = tuple(config.get("modules_to_save") or ())
    if names and config.get("ensure_weight_tying") and key == PREFIX + "lm_head.weight":
        return True
    return key.startswith(PREFIX) and bool(names) and key.rpartition(".")[0].endswith(names)


def _split(key: str, folder: Path) -> tuple[str, str]:
    """The module path and the side (A, B, magnitude) of a tensor's name."""
    for side, suffix in SUFFIXES.items():
        if key.startswith(PREFIX) and key.endswith(suffix):
            return key[len(PREFIX) : -len(suffix)], side
    raise AdapterError(f"{folder / WEIGHTS}: {key!r} does not belong to LoRA or DoRA; only these can be read.")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    _require(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is not a complete safetensors file: {error}") from error


def _require(path: Path) -> None:
    if not path.is_file():
        raise AdapterError(f"{path} does not exist: an adapter folder has {CONFIG} and {WEIGHTS}.")
