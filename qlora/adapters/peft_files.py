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

from qlora.adapters.adapter_folder import CONFIG as CONFIG
from qlora.adapters.adapter_folder import WEIGHTS as WEIGHTS
from qlora.adapters.adapter_folder import require_adapter_folder
from qlora.adapters.adapter_keys import PREFIX as PREFIX
from qlora.adapters.adapter_keys import SUFFIXES as SUFFIXES
from qlora.adapters.adapter_keys import refuse_incomplete, sort_tensors
from qlora.adapters.dora import DoraLinear
from qlora.adapters.expert_keys import (
    join_experts,
    keys_of_stacks,
    split_experts,
    stack_a,
    stack_b,
    unstack_a,
    unstack_b,
)
from qlora.adapters.expert_lora import ExpertLora
from qlora.adapters.inject import adapted, adapted_experts
from qlora.adapters.lora import Lora
from qlora.adapters.modules_to_save import weights_to_save
from qlora.adapters.peft_config import build_config, rank_of, read_config, report_unclear_alphas
from qlora.adapters.peft_fields import report_unknown_fields
from qlora.adapters.trainable_tokens import TENSOR_SUFFIX, token_rows
from qlora.errors import AdapterError, QloraError
from qlora.utils.atomic_files import write_bytes, write_json

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
    pairs: Mapping[str, tuple[Tensor, Tensor]]  # path -> (A [R, I], B [O, R]); of an expert `...gate_up_proj.3`
    base_sha256: str | None
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)  # path -> m [O]; of DoRA, for every pair
    modules: Mapping[str, Tensor] = field(default_factory=dict)  # name -> weight of a module to save
    rows: Mapping[str, Tensor] = field(default_factory=dict)  # path -> trained rows [N, I] of embedding or head
    embeddings: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # path -> (A [R, V], B [I, R])
    base_weights: Mapping[str, Tensor] = field(default_factory=dict)  # path -> W beside an update of embedding or head
    notes: tuple[str, ...] = ()  # lines to show where it is loaded
    is_changed: bool = False  # since it was read from the folder: to fit a base


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names: `base_model.model.{path}.lora_A.weight` [R, I] and `.lora_B` [O, R].

    DoRA has a `.lora_magnitude_vector` [O] as well; modules to save keep their own names. Experts: expert_keys.py.
    """
    named: dict[str, Tensor] = {}
    for path, layer in adapted(model).items():
        a, b = layer.pair()
        named[PREFIX + path + SUFFIXES["A"]] = a.detach()
        named[PREFIX + path + SUFFIXES["B"]] = b.detach()
        if isinstance(layer, DoraLinear):
            named[PREFIX + path + SUFFIXES["magnitude"]] = layer.magnitude.detach()
    for key, stack in _stacks_by_key(model).items():
        a, b = stack.pair()
        named[PREFIX + key + SUFFIXES["A"]] = stack_a(a.detach())
        named[PREFIX + key + SUFFIXES["B"]] = stack_b(b.detach())
    named |= {PREFIX + path + TENSOR_SUFFIX: module.rows.detach() for path, module in token_rows(model).items()}
    return named | {PREFIX + name: value.detach() for name, value in weights_to_save(model)}


@torch.no_grad()
def load_tensors(model: nn.Module, named: Mapping[str, Tensor]) -> None:
    """Overwrite the adapters of `model`, in place, by what `tensors` returned for it."""
    for path, layer in adapted(model).items():
        layer.load_pair(named[PREFIX + path + SUFFIXES["A"]], named[PREFIX + path + SUFFIXES["B"]])
        if isinstance(layer, DoraLinear):
            layer.magnitude.copy_(named[PREFIX + path + SUFFIXES["magnitude"]])
    for key, stack in _stacks_by_key(model).items():
        a, b = (named[PREFIX + key + SUFFIXES[side]] for side in ("A", "B"))
        stack.load_pair(unstack_a(a, len(stack.base)), unstack_b(b, len(stack.base)))
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


def write_file(folder: Path, file: AdapterFile) -> None:
    """Write an adapter as `read` returns it. QloraError, and nothing is written, if a value is not finite."""
    pairs = join_experts(file.pairs, file.config)
    sides = {"A": {path: a for path, (a, _) in pairs.items()}, "B": {path: b for path, (_, b) in pairs.items()}}
    layers = {**sides, "magnitude": file.magnitudes}
    named = {
        f"{PREFIX}{path}{SUFFIXES[side]}": value for side, values in layers.items() for path, value in values.items()
    }
    named |= {PREFIX + path + TENSOR_SUFFIX: rows for path, rows in file.rows.items()}
    named |= {PREFIX + name: weight for name, weight in file.modules.items()}
    named = {key: value.cpu().contiguous() for key, value in named.items()}
    refuse_non_finite(named, folder / WEIGHTS)
    write_bytes(folder / WEIGHTS, serialize(named, {FINGERPRINT: file.base_sha256} if file.base_sha256 else {}))
    write_json(folder / CONFIG, dict(file.config))


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
    require_adapter_folder(folder)
    config = read_config(folder / CONFIG)
    named, metadata = _read_safetensors(folder / WEIGHTS)
    tensors = sort_tensors(named, tuple(config.get("modules_to_save") or ()), folder / WEIGHTS)
    refuse_incomplete(tensors, bool(config.get("use_dora")), folder / WEIGHTS)
    sides, notes = tensors.sides.items(), [*report_unknown_fields(folder / CONFIG, config)]
    pairs = {path: (layer["A"], layer["B"]) for path, layer in sides if "A" in layer}
    pairs = split_experts(pairs, config, lambda stack: rank_of(config, stack), folder / WEIGHTS)
    if FINGERPRINT not in metadata:
        notes += report_unclear_alphas(folder / CONFIG, config, [*pairs, *tensors.embeddings])
    return AdapterFile(
        folder,
        config,
        pairs,
        metadata.get(FINGERPRINT),
        {path: layer["magnitude"] for path, layer in sides if "magnitude" in layer},
        tensors.modules,
        tensors.rows,
        {path: (pair["embedding A"], pair["embedding B"]) for path, pair in tensors.embeddings.items()},
        tensors.base_weights,
        (*notes, *([tensors.note] if tensors.note else [])),
    )


def _stacks_by_key(model: nn.Module) -> dict[str, ExpertLora]:
    """What the names of each adapted stack's tensors begin with -> the stack."""
    stacks = adapted_experts(model)
    return {key: stacks[path] for path, key in keys_of_stacks(stacks).items()}


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
