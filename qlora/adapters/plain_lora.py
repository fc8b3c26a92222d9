"""A plain LoRA folder: scaling folded into B, one rank for all layers, alpha = rank, no patterns.

Every reader of PEFT's format computes the same update: the scaling is 1 whether alpha, rsLoRA and patterns are read or
not. Only experts, of which there are many, keep their own rank, with an alpha equal to it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora.adapters.expert_keys import join_experts, name_in_patterns, stack_of, target_fields
from qlora.adapters.peft_config import build_plain_config, has_layer_filter, module_settings
from qlora.adapters.peft_files import CONFIG, FINGERPRINT, PREFIX, SUFFIXES, WEIGHTS, AdapterFile, serialize
from qlora.adapters.peft_starts import changed_start
from qlora.adapters.spectrum import factors
from qlora.errors import AdapterError
from qlora.utils.atomic_files import write_bytes, write_json

Pairs = Mapping[str, tuple[Tensor, Tensor]]  # path -> (A [R, I], B [O, R]) whose product is the whole update


def fold_scaling(file: AdapterFile, weight: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapter's A and B, its scaling and `weight` multiplied into B. AdapterError unless it is A and B only."""
    refuse_changed_base(file)
    refuse_base_weights(file)
    if file.magnitudes:
        raise AdapterError(
            f"{file.folder}: DoRA scales the rows of the base, which no low-rank pair can represent. "
            "`qlora export --to portable` writes the nearest LoRA, --to merged the exact weights."
        )
    return {
        path: (a.float(), b.float() * (weight * module_settings(file.config, path, a.shape[0]).scaling))
        for path, (a, b) in file.pairs.items()
    }


def refuse_base_weights(file: AdapterFile) -> None:
    """AdapterError if the adapter holds whole weights, or whole rows of them."""
    names = {*file.modules, *file.embeddings, *file.base_weights, *(f"rows of {path}" for path in file.rows)}
    if names:
        raise AdapterError(
            f"{file.folder}: {', '.join(sorted(names)[:3])} were trained in full, which no low-rank pair can "
            "represent. Use `qlora export --to merged`."
        )


def refuse_changed_base(file: AdapterFile) -> None:
    """AdapterError for an adapter whose start changed its base: A and B are not its update."""
    start = changed_start(file.folder / CONFIG, file.config)
    if start:
        raise AdapterError(
            f"{file.folder}: its start ({start}) changed the base, so that A and B alone are not its update. "
            f"`qlora export {file.folder} OUT --to adapter` writes the update: use OUT."
        )


def truncate(pairs: Pairs, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The best approximation of at most `rank` to each update, A and B of equal norm."""
    return {path: factors(a, b, 1.0).pair(min(rank, len(a))) for path, (a, b) in pairs.items()}


def pad(pairs: Pairs, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Zeros added to A's rows and B's columns up to `rank`: the same updates."""
    return {
        path: (F.pad(a, (0, 0, 0, rank - a.shape[0])), F.pad(b, (0, rank - b.shape[1])))
        for path, (a, b) in pairs.items()
    }


def concatenate(adapters: Sequence[Pairs]) -> dict[str, tuple[Tensor, Tensor]]:
    """The exact sum of several adapters' updates: their A and B concatenated along the rank."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter):
        sides = [adapter[path] for adapter in adapters if path in adapter]
        pairs[path] = (torch.cat([a for a, _ in sides]), torch.cat([b for _, b in sides], dim=1))
    return pairs


def largest_rank(pairs: Pairs) -> int:
    """The largest rank of any layer."""
    return max(a.shape[0] for a, _ in pairs.values())


def write_plain_lora(folder: Path, pairs: Pairs, source: AdapterFile, targets: Mapping[str, Any]) -> None:
    """Write the two files of an adapter; base, revision, dropout and fingerprint are those of `source`.

    AdapterError, and nothing is written, if a value is not finite.
    """
    experts = {path: pair for path, pair in pairs.items() if stack_of(targets, path)}
    others = {path: pair for path, pair in pairs.items() if path not in experts}
    rank = largest_rank(others or experts)
    ranks = _expert_ranks(experts, targets)
    named: dict[str, Tensor] = {}
    for path, (a, b) in join_experts({**pad(others, rank), **experts}, targets).items():
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise AdapterError(f"{folder / WEIGHTS}: {path} has a value that is not finite; nothing was written.")
        named[PREFIX + path + SUFFIXES["A"]], named[PREFIX + path + SUFFIXES["B"]] = a.contiguous(), b.contiguous()
    metadata = {FINGERPRINT: source.base_sha256} if source.base_sha256 else {}
    write_bytes(folder / WEIGHTS, serialize(named, metadata))
    patterns = {key: value for key, value in ranks.items() if value != rank}
    write_json(folder / CONFIG, build_plain_config(source.config, rank, targets, patterns))


def joint_targets(files: Sequence[AdapterFile]) -> dict[str, Any]:
    """Fields that match every layer of `files` and no other: the union of their lists, or else full paths.

    A list of names is exact for its own adapter, so the union is exact for the sum; a regular expression is not copied,
    since vLLM and SGLang read a list.
    """
    targets = [file.config.get("target_modules") for file in files]
    lists = [names for names in targets if isinstance(names, list)]
    parameters = sorted({str(name) for file in files for name in file.config.get("target_parameters") or ()})
    if any(has_layer_filter(file.config) for file in files) or len(lists) < len(targets):
        return target_fields({"target_parameters": parameters}, {path: path for file in files for path in file.pairs})
    modules = sorted({str(name) for names in lists for name in names})
    return {"target_modules": modules} | ({"target_parameters": parameters} if parameters else {})


def _expert_ranks(experts: Pairs, targets: Mapping[str, Any]) -> dict[str, int]:
    """Name of a target parameter, or path of a stack if its name stands for several ranks -> rank."""
    stacks = {name_in_patterns(targets, path): len(a) for path, (a, _) in experts.items()}
    ranks: dict[str, int] = {}
    for name in targets.get("target_parameters") or ():
        members = {stack: rank for stack, rank in stacks.items() if f".{stack}".endswith(f".{name}")}
        ranks |= {name: next(iter(members.values()))} if len(set(members.values())) == 1 else members
    return ranks
