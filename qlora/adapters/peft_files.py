"""An adapter on disk, in PEFT's file format, both ways; refuses what does not fit.  Door: safetensors.

Every file carries the fingerprint of its base in the safetensors header, where PEFT and the servers ignore it.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from qlora.adapters.dora import Dora, DoraLinear
from qlora.adapters.inject import adapted, frozen_linears, replace
from qlora.adapters.lora import Lora, LoraLinear
from qlora.adapters.modules_to_save import fitted_modules, saved_tensors, written_names
from qlora.adapters.patterns import by_pattern
from qlora.adapters.rslora import RsLora
from qlora.adapters.trainable_tokens import SUFFIX, fitted_rows, indices, row_modules
from qlora.errors import AdapterError, QloraError
from qlora.utils.atomic_files import read_json, write_bytes, write_json
from qlora.utils.sandbox import LimitExceeded, within_limits

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
SUFFIXES = {"A": ".lora_A.weight", "B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
FINGERPRINT = "qlora.base_sha256"
MAX_RANK = 65_536
MAX_EXPRESSION = 500  # characters of a pattern's key
PEFT_ALPHA = 8  # PEFT's own default
PEFT_FIELDS: Mapping[str, Any] = {  # adapter_config.json: what every PEFT since 0.10 knows, and what never differs here
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": None, "bias": "none", "fan_in_fan_out": False,
    "inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_alpha": None, "lora_dropout": 0.0, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "r": None, "rank_pattern": {},
    "revision": None, "target_modules": None, "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
}  # fmt: skip
REFUSED = (  # settings that change what an adapter computes, in ways that are not built
    "lora_bias", "layer_replication", "alora_invocation_tokens", "use_qalora",
    "target_parameters", "fan_in_fan_out", "use_bdlora", "kasa_config", "velora_config",
    "monteclora_config", "arrow_config",
)  # fmt: skip


@dataclass(frozen=True)
class Identity:
    """Which base an adapter belongs to: name and commit as the user knows them, fingerprint of its weights."""

    name: str
    revision: str | None
    sha256: str


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names: `base_model.model.{path}.lora_A.weight` [R, I] and `.lora_B` [O, R].

    DoRA has a `.lora_magnitude_vector` [O] as well; modules that train whole have their own names.
    """
    named: dict[str, Tensor] = {}
    for path, layer in adapted(model).items():
        a, b = layer.pair()
        named[PREFIX + path + SUFFIXES["A"]] = a.detach()
        named[PREFIX + path + SUFFIXES["B"]] = b.detach()
        if isinstance(layer, DoraLinear):
            named[PREFIX + path + SUFFIXES["magnitude"]] = layer.magnitude.detach()
    named |= {PREFIX + path + SUFFIX: each.rows.detach() for path, each in row_modules(model).items()}
    return named | {PREFIX + name: value.detach() for name, value in saved_tensors(model)}


@torch.no_grad()
def fill(model: nn.Module, named: Mapping[str, Tensor]) -> None:
    """Overwrite the adapters of `model` with what `tensors` gave for it, in place."""
    for path, layer in adapted(model).items():
        layer.fill(named[PREFIX + path + SUFFIXES["A"]], named[PREFIX + path + SUFFIXES["B"]])
        if isinstance(layer, DoraLinear):
            layer.magnitude.copy_(named[PREFIX + path + SUFFIXES["magnitude"]])
    for name, value in saved_tensors(model):
        value.copy_(named[PREFIX + name])
    for path, each in row_modules(model).items():
        each.rows.copy_(named[PREFIX + path + SUFFIX])


def write(folder: Path, model: nn.Module, adapter: Lora, base: Identity) -> None:
    """Write adapter_model.safetensors and adapter_config.json, as PEFT reads them.

    QloraError, and nothing is written, if a value is not finite.
    """
    named = {key: value.cpu().contiguous() for key, value in tensors(model).items()}
    refuse_non_finite(named, folder / WEIGHTS)
    write_bytes(folder / WEIGHTS, serialize(named, {FINGERPRINT: base.sha256}))
    write_json(folder / CONFIG, config_of(model, adapter, base))


def refuse_non_finite(named: Mapping[str, Tensor], path: Path) -> None:
    """QloraError, naming the tensor, if one that is to be written to `path` has a NaN or an infinity."""
    for key, value in named.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise QloraError(
                f"{path}: {key} has a value that is not finite; nothing was written. "
                "Lower optim.learning_rate, and go on from the newest checkpoint."
            )


def serialize(named: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file in memory, its header marked as PyTorch's; the same tensors are the same bytes."""
    seen: set[int] = set()
    apart = {}  # a tied tensor is written under each of its names
    for key, value in named.items():
        apart[key] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    written = save(apart, metadata={"format": "pt", **(metadata or {})})
    size = int.from_bytes(written[:8], "little")
    # The library writes its header's entries in random order.
    header = json.dumps(json.loads(written[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + written[8 + size :]


def read_named(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. AdapterError if it is missing or damaged."""
    return _read_tensors(path)[0]


def config_of(model: nn.Module, adapter: Lora, base: Identity) -> dict[str, Any]:
    """adapter_config.json with the fields every PEFT since 0.10 knows."""
    path, layer = next(iter(adapted(model).items()))
    stored = adapter.widened(layer.pair()[0].shape[0] // adapter.at(path).rank)
    rows = indices(model)
    return dict(PEFT_FIELDS) | {
        "alpha_pattern": {key: _plain(alpha) for key, alpha in stored.alpha_pattern.items()},
        "base_model_name_or_path": base.name,
        "lora_alpha": _plain(stored.alpha),
        "lora_dropout": adapter.dropout,
        "modules_to_save": written_names(model),
        "r": stored.rank,
        "rank_pattern": dict(stored.rank_pattern),
        "revision": base.revision,
        "target_modules": target_names(model),
        **({"trainable_token_indices": rows} if rows else {}),
        "use_dora": isinstance(adapter, Dora),
        "use_rslora": isinstance(adapter, RsLora),
    }


def _plain(alpha: float) -> float:
    """A whole number where it is one: so Ollama reads it."""
    return int(alpha) if alpha == int(alpha) else alpha


def target_names(model: nn.Module) -> list[str]:
    """The shortest names that mean exactly the adapted layers: leaf names (servers want those), else whole paths."""
    chosen = set(adapted(model))
    leaves = {path.rpartition(".")[2] for path in chosen}
    # PEFT matches names against every module, so a leaf must not occur outside the adapted layers.
    reached = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in leaves}
    return sorted(leaves if reached == chosen else chosen)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder as read: settings, tensors by module path, and the base's fingerprint if it carries one."""

    folder: Path
    config: Mapping[str, Any]
    pairs: Mapping[str, tuple[Tensor, Tensor]]  # path -> (A [R, I], B [O, R])
    base_sha256: str | None
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)  # path -> m [O]; of DoRA, for every pair
    modules: Mapping[str, Tensor] = field(default_factory=dict)  # name -> weight of a module that trained whole
    rows: Mapping[str, Tensor] = field(default_factory=dict)  # path -> rows [N, I] of embedding or head that trained


def read(folder: Path) -> AdapterFile:
    """Read an adapter folder written by us or by PEFT. AdapterError if it is damaged or neither LoRA nor DoRA."""
    config = _read_config(folder / CONFIG)
    named, metadata = _read_tensors(folder / WEIGHTS)
    sides: dict[str, dict[str, Tensor]] = {}
    modules = {key.removeprefix(PREFIX): value for key, value in named.items() if _is_saved(key, config)}
    rows = {key[len(PREFIX) : -len(SUFFIX)]: value for key, value in named.items() if key.endswith(SUFFIX)}
    for key, value in named.items():
        if key.removeprefix(PREFIX) not in modules and not key.endswith(SUFFIX):
            path, side = _split(key, folder)
            sides.setdefault(path, {})[side] = value
    needed = set(SUFFIXES) if config.get("use_dora") else {"A", "B"}
    odd = next((path for path, found in sides.items() if found.keys() != needed), None)
    if odd or not sides:
        names = ", ".join(SUFFIXES[side].split(".")[1] for side in sorted(needed))
        raise AdapterError(f"{folder / WEIGHTS}: {odd or 'the file'} must have exactly {names}, as its {CONFIG} says.")
    pairs = {path: (found["A"], found["B"]) for path, found in sides.items()}
    magnitudes = {path: found["magnitude"] for path, found in sides.items() if "magnitude" in found}
    return AdapterFile(folder, config, pairs, metadata.get(FINGERPRINT), magnitudes, modules, rows)


def attach(model: nn.Module, file: AdapterFile, base_sha256: str, allow_other_base: bool = False) -> str | None:
    """Put an adapter file's layers on `model`; returns a line to show when its base can't be checked.

    AdapterError if it was trained on other weights, or one of its tensors has no place or another shape here.
    """
    layers, note = fitted(model, file, base_sha256, allow_other_base)
    for path, layer in layers.items():
        replace(model, path, layer)
    return note


def fitted(
    model: nn.Module, file: AdapterFile, base_sha256: str, allow_other_base: bool = False
) -> tuple[dict[str, nn.Module], str | None]:
    """`attach` without a change to `model`: the layers by path, each around the model's own frozen matrix."""
    note = _check_base(file, base_sha256, allow_other_base)
    frozen = frozen_linears(model)
    problems = [problem for path, pair in file.pairs.items() if (problem := _misfit(path, pair, frozen))]
    problems += [problem for path, m in file.magnitudes.items() if (problem := _odd_magnitude(path, m, frozen))]
    problems += [f"{path} is named by target_modules, but the file lacks it" for path in _lacking(file, frozen)]
    modules, odd = fitted_modules(model, file.modules)
    tokens, odd_rows = fitted_rows(model, file.config, file.rows)
    problems += odd + odd_rows + _unsaid(file)
    if problems:
        listed = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise AdapterError(f"{file.folder}: does not fit this base: {listed}.")
    layers: dict[str, nn.Module] = {**modules, **tokens}
    for path, (a, b) in file.pairs.items():
        kind = DoraLinear if path in file.magnitudes else LoraLinear
        layers[path] = layer = kind(frozen[path], a.shape[0], settings(file, path, a.shape[0]).scaling, 0.0)
        layer.fill(a, b)
        if isinstance(layer, DoraLinear):
            layer.magnitude.data.copy_(file.magnitudes[path])
    return layers, note


def settings(file: AdapterFile, path: str, rank: int) -> Lora:
    """Kind, rank and alpha of one module, the patterns of the config taken into account."""
    alpha = _within_ceilings(file.config.get("alpha_pattern") or {}, path, file.config.get("lora_alpha", PEFT_ALPHA))
    kind = RsLora if file.config.get("use_rslora") else Lora
    return kind(rank=rank, alpha=float(alpha), dropout=float(file.config.get("lora_dropout") or 0.0))


def _check_base(file: AdapterFile, base_sha256: str, allow_other_base: bool) -> str | None:
    if file.base_sha256 is None:
        return f"{file.folder} carries no fingerprint of its base: that it belongs to this one can't be checked."
    if file.base_sha256 != base_sha256 and not allow_other_base:
        named = file.config.get("base_model_name_or_path")
        raise AdapterError(
            f"{file.folder}: was trained on other weights (base {named!r}, sha256 {file.base_sha256[:12]}...; "
            f"this base is {base_sha256[:12]}...). Load the base it was trained on."
        )
    return None


def _misfit(path: str, pair: tuple[Tensor, Tensor], frozen: Mapping[str, Any]) -> str | None:
    a, b = pair
    if path not in frozen:
        return f"{path} is no linear layer here"
    layer = frozen[path]
    if not (a.is_floating_point() and b.is_floating_point()):
        return f"{path} is stored as {a.dtype}, not as numbers"
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not 1 <= a.shape[0] <= MAX_RANK:
        return f"{path} has A {list(a.shape)} and B {list(b.shape)}"
    if (b.shape[0], a.shape[1]) != (layer.out_features, layer.in_features):
        return f"{path} is made for [{b.shape[0]}, {a.shape[1]}], here is [{layer.out_features}, {layer.in_features}]"
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return f"{path} has values that are not finite"
    return None


def _odd_magnitude(path: str, magnitude: Tensor, frozen: Mapping[str, Any]) -> str | None:
    rows = frozen[path].out_features if path in frozen else len(magnitude)
    if magnitude.shape != (rows,) or not magnitude.is_floating_point() or not torch.isfinite(magnitude).all():
        return f"{path} has a magnitude {list(magnitude.shape)} of {magnitude.dtype}, needed: {rows} finite numbers"
    return None


def _within_ceilings(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first key that, read as an expression, is the path or its end wins.

    AdapterError for an expression that takes for ever.
    """
    if not patterns:
        return default
    try:
        return within_limits(lambda: by_pattern(patterns, path, default))
    except (LimitExceeded, MemoryError):
        raise AdapterError(f"{CONFIG}: alpha_pattern: one of its expressions takes for ever on {path!r}.") from None


def _is_saved(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a key is a weight of one of `modules_to_save`, which PEFT matches as ends of paths; or tied to one."""
    names = tuple(config.get("modules_to_save") or ())
    if names and config.get("ensure_weight_tying") and key == PREFIX + "lm_head.weight":
        return True
    return key.startswith(PREFIX) and bool(names) and key.rpartition(".")[0].endswith(names)


def _split(key: str, folder: Path) -> tuple[str, str]:
    for side, suffix in SUFFIXES.items():
        if key.startswith(PREFIX) and key.endswith(suffix):
            return key[len(PREFIX) : -len(suffix)], side
    raise AdapterError(f"{folder / WEIGHTS}: {key!r} is no part of LoRA or DoRA; only these can be read.")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise AdapterError(f"{path} is not there: an adapter folder has {CONFIG} and {WEIGHTS}.")
    try:
        found = read_json(path)
    except ValueError as error:
        raise AdapterError(f"{path} is no JSON object: {error}") from error
    if found.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type must be LORA.")
    refused = next((key for key in REFUSED if found.get(key)), None)
    if refused:
        raise AdapterError(f"{path}: {refused} can't be read yet.")
    _check_numbers(path, found)
    return found


def _check_numbers(path: Path, config: Mapping[str, Any]) -> None:
    """AdapterError unless alpha, dropout and the patterns are what they should be."""
    alphas, ranks = (config.get(key) or {} for key in ("alpha_pattern", "rank_pattern"))
    for key, patterns in (("alpha_pattern", alphas), ("rank_pattern", ranks)):
        if not isinstance(patterns, dict) or not all(_is_expression(each) for each in patterns):
            raise AdapterError(f"{path}: {key} must map expressions for module names to numbers.")
    if not all(type(rank) is int and 1 <= rank <= MAX_RANK for rank in ranks.values()):
        raise AdapterError(f"{path}: rank_pattern: found {str(ranks)[:80]}, allowed: whole numbers from 1.")
    for alpha in (config.get("lora_alpha", PEFT_ALPHA), *alphas.values()):
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
            raise AdapterError(f"{path}: lora_alpha: found {alpha!r}, allowed: a number above 0.")
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise AdapterError(f"{path}: modules_to_save must be a list of names.")
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise AdapterError(f"{path}: lora_dropout: found {dropout!r}, allowed: a number from 0 to below 1.")


def _is_expression(key: Any) -> bool:
    try:
        return isinstance(key, str) and len(key) < MAX_EXPRESSION and re.compile(rf"(?:.*\.)?(?:{key})") is not None
    except (re.error, OverflowError, RecursionError):
        return False


def _lacking(file: AdapterFile, frozen: Mapping[str, Any]) -> list[str]:
    """Layers of the base that the adapter's settings name, but its file does not hold."""
    named = file.config.get("target_modules")
    narrowed = any(file.config.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    if narrowed or not isinstance(named, list):
        return []
    wanted = [path for path in frozen if any(path == name or path.endswith(f".{name}") for name in named)]
    return [path for path in wanted if path not in file.pairs]


def _unsaid(file: AdapterFile) -> list[str]:
    """What the adapter's settings say trained whole, but its file does not hold."""
    paths = [key.rpartition(".")[0] for key in file.modules]
    names = file.config.get("modules_to_save") or []
    found = [f"{name} is named by modules_to_save" for name in names if not any(path.endswith(name) for path in paths)]
    if file.config.get("trainable_token_indices") and not file.rows:
        found.append("rows are named by trainable_token_indices")
    return [f"{each}, but the file lacks it" for each in found]


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise AdapterError(f"{path} is not there: an adapter folder has {CONFIG} and {WEIGHTS}.")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is not a whole safetensors file: {error}") from error
