"""Fingerprint of a base model: sha256 over its tensors and numeric settings, and the manifest of what was quantized.

The fingerprint does not depend on the file layout, the shard order or the stored dtype, only on names, shapes, values
and the numeric settings of config.json (numerics.py): each tensor is hashed in the smallest of bfloat16, float16 and
float32 that holds it exactly.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 22  # values hashed at a time: bounds the copy that hashing needs


@dataclass(frozen=True)
class BaseManifest:
    """What resume, merge and serving check: the base's name, commit, fingerprint, dtype and quantized tensors."""

    name: str
    revision: str | None
    sha256: str
    dtype: str
    quantized: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # module path -> FrozenLinear.describe()
    ignored: tuple[str, ...] = ()  # checkpoint keys that match no parameter of the model
    left_out: Mapping[str, str] = field(default_factory=dict)  # linear layers that stay in 16 bits -> reason
    kept: tuple[str, ...] = ()  # tensors of the model that are not quantized

    def as_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values."""
        return {
            **asdict(self),
            "quantized": _by_stack(self.quantized),
            "ignored": list(self.ignored),
            "left_out": dict(self.left_out),
            "kept": list(self.kept),
        }


def _by_stack(quantized: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One entry `path.*` with their number for the matrices of a stack, if they are stored alike."""
    stacks: dict[str, list[str]] = {}
    for path in quantized:
        stack, _, number = path.rpartition(".")
        stacks.setdefault(f"{stack}.*" if number.isdecimal() else path, []).append(path)
    entries: dict[str, Any] = {}
    for stack, paths in stacks.items():
        errors = {"second_error": max(float(quantized[path].get("second_error", 0.0)) for path in paths)}
        first = {**quantized[paths[0]], **(errors if errors["second_error"] else {})}
        if len(paths) > 1 and all(
            {**quantized[path], "second_error": 0.0} == first | {"second_error": 0.0} for path in paths
        ):
            entries[stack] = {**first, "matrices": len(paths)}
        else:
            entries |= {path: quantized[path] for path in paths}
    return entries


class Fingerprint:
    """Collects a digest per tensor, in any order; `hexdigest()` combines them."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}  # by name; digests from other ranks may be added

    def add(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Hash what is stored under `name`: one tensor, or all tensors of a quantized layer."""
        digest = hashlib.sha256()
        for tensor in tensors:
            _update(digest, tensor)
        self.digests[name] = digest.hexdigest()

    def add_text(self, name: str, text: str) -> None:
        """Hash a text under `name`, which no tensor has."""
        self.digests[name] = hashlib.sha256(text.encode()).hexdigest()

    def hexdigest(self) -> str:
        """One sha256 over all names and their digests."""
        lines = "".join(f"{name} {self.digests[name]}\n" for name in sorted(self.digests))
        return hashlib.sha256(lines.encode()).hexdigest()


def _update(digest: Any, tensor: Tensor) -> None:
    values = tensor.detach().cpu().contiguous().reshape(-1)
    dtype = _smallest_exact(values) if values.is_floating_point() else values.dtype
    digest.update(f"{list(tensor.shape)} {dtype}".encode())
    for start in range(0, values.numel(), CHUNK):
        chunk = values[start : start + CHUNK].to(dtype).contiguous()
        digest.update(chunk.view(torch.uint8).numpy())


def _smallest_exact(values: Tensor) -> torch.dtype:
    """The first of bfloat16, float16, float32 that holds every value exactly."""
    if values.dtype == torch.bfloat16:
        return torch.bfloat16
    for dtype in (torch.bfloat16, torch.float16):
        chunks = (values[start : start + CHUNK] for start in range(0, values.numel(), CHUNK))
        if all(torch.equal(chunk.to(dtype).to(chunk.dtype), chunk) for chunk in chunks):
            return dtype
    return torch.float32
