"""A plain LoRA folder made from matrices alone: the scale folded into B, one rank for all, alpha = rank, no patterns.

Every reader of PEFT's format means the same by it: the scale is 1 whether alpha, rsLoRA and patterns are read or not.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora.adapters.peft_files import (
    CONFIG,
    FINGERPRINT,
    PEFT_FIELDS,
    PREFIX,
    WEIGHTS,
    AdapterFile,
    serialize,
    settings,
)
from qlora.adapters.spectrum import factors
from qlora.errors import AdapterError
from qlora.utils.atomic_files import write_bytes, write_json

Pairs = Mapping[str, tuple[Tensor, Tensor]]  # path -> (A [R, I], B [O, R]) whose product is the whole update


def folded(file: AdapterFile, weight: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapter's matrices with their scale, and `weight`, multiplied into B. AdapterError if there is more to it."""
    refuse_whole(file)
    if file.magnitudes:
        raise AdapterError(
            f"{file.folder}: DoRA scales the rows of the base, which no low-rank pair says. "
            "`qlora export --to portable` writes the nearest LoRA, --to merged takes it as it is."
        )
    return {
        path: (a.float(), b.float() * (weight * settings(file, path, a.shape[0]).scaling))
        for path, (a, b) in file.pairs.items()
    }


def refuse_whole(file: AdapterFile) -> None:
    """AdapterError if the adapter holds modules, or rows of them, that trained whole."""
    if file.modules or file.rows:
        named = ", ".join(sorted({*file.modules, *(f"rows of {path}" for path in file.rows)})[:3])
        raise AdapterError(
            f"{file.folder}: {named} trained whole, which no low-rank pair says. `qlora export --to merged` takes it."
        )


def truncated(pairs: Pairs, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Each update's best approximation of `rank`, A and B of equal length."""
    return {path: factors(a, b, 1.0).pair(rank) for path, (a, b) in pairs.items()}


def padded(pairs: Pairs, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Zeros added to A's rows and B's columns up to `rank`: the same updates."""
    return {
        path: (F.pad(a, (0, 0, 0, rank - a.shape[0])), F.pad(b, (0, rank - b.shape[1])))
        for path, (a, b) in pairs.items()
    }


def concatenated(many: Sequence[Pairs]) -> dict[str, tuple[Tensor, Tensor]]:
    """The sum of several adapters' updates, exactly: their directions side by side."""
    joined: dict[str, tuple[Tensor, Tensor]] = {}
    for path in dict.fromkeys(path for pairs in many for path in pairs):
        sides = [pairs[path] for pairs in many if path in pairs]
        joined[path] = (torch.cat([a for a, _ in sides]), torch.cat([b for _, b in sides], dim=1))
    return joined


def largest_rank(pairs: Pairs) -> int:
    """The rank of the widest layer."""
    return max(a.shape[0] for a, _ in pairs.values())


def write_plain(folder: Path, pairs: Pairs, origin: AdapterFile, targets: Any) -> None:
    """Write the two files of an adapter; base, revision, dropout and fingerprint are those of `origin`.

    AdapterError, and nothing is written, if a value is not finite.
    """
    rank = largest_rank(pairs)
    named: dict[str, Tensor] = {}
    for path, (a, b) in padded(pairs, rank).items():
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise AdapterError(f"{folder / WEIGHTS}: {path} has a value that is not finite; nothing was written.")
        named[f"{PREFIX}{path}.lora_A.weight"], named[f"{PREFIX}{path}.lora_B.weight"] = a.contiguous(), b.contiguous()
    metadata = {FINGERPRINT: origin.base_sha256} if origin.base_sha256 else {}
    write_bytes(folder / WEIGHTS, serialize(named, metadata))
    write_json(folder / CONFIG, plain_config(origin, rank, targets))


def plain_config(origin: AdapterFile, rank: int, targets: Any) -> dict[str, Any]:
    """adapter_config.json with the fields that every PEFT since 0.10 knows, and a scale of 1."""
    return dict(PEFT_FIELDS) | {
        "base_model_name_or_path": origin.config.get("base_model_name_or_path"),
        "lora_alpha": rank,
        "lora_dropout": float(origin.config.get("lora_dropout") or 0.0),
        "r": rank,
        "revision": origin.config.get("revision"),
        "target_modules": targets,
    }


def targets_of(files: Sequence[AdapterFile]) -> list[str]:
    """Names that mean every layer of `files` and no other: their own lists put together, or else whole paths.

    A list of names is exact for its own adapter, so the lists together are exact for the sum; an expression is not
    taken over, since vLLM and SGLang read a list.
    """
    lists = [file.config.get("target_modules") for file in files]
    names = [names for names in lists if isinstance(names, list) and names]
    narrowing = ("layers_to_transform", "layers_pattern", "exclude_modules")
    narrowed = any(file.config.get(key) for file in files for key in narrowing)
    if narrowed or len(names) < len(lists):
        return sorted({path for file in files for path in file.pairs})
    return sorted({str(name) for each in names for name in each})
