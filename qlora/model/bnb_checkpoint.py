"""Reader of bitsandbytes 4-bit checkpoints.

A packed `{P}.weight` is stored with its scales and a JSON tensor, whose name says that it is 4-bit and of which kind:

    {P}.weight                                    packed codes: uint8 [ceil(O*I/2), 1], or these bytes in another type
    {P}.weight.absmax                             float32 [N], or uint8 [N] when itself quantized
    {P}.weight.quant_map                          float32 [16], the levels
    {P}.weight.nested_absmax, .nested_quant_map   float32 [ceil(N/256)], [256]; only when absmax is quantized
    {P}.weight.quant_state.bitsandbytes__nf4      uint8: JSON with shape, blocksize, and the offset of nested ones

The keys decide, tensor by tensor; config.json is not read. Nothing is requantized, so no bit changes.
"""

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.errors import BaseModelError
from qlora.quant import Keeping, Quantizer
from qlora.quant.block_sizes import BLOCKS, NESTED_BLOCK
from qlora.quant.blockwise import dynamic_levels
from qlora.quant.fourbit_linear import FourBitLinear, FourBitTensors
from qlora.quant.levels import LEVELS
from qlora.quant.linear import FrozenLinear

TENSORS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
MAX_STATE_BYTES = 4096  # of JSON; real ones have about 200


def is_prequantized(key: str, keys: Container[str]) -> bool:
    """Whether `key` ("model.layers.0.mlp.up_proj.weight") is stored in 4 bits, judged by the checkpoint's `keys`."""
    return any(f"{key}.{_state_name(kind)}" in keys for kind in LEVELS)


def companion_keys(key: str) -> tuple[str, ...]:
    """Every key that may be stored with a 4-bit `key` and is read together with it."""
    return tuple(f"{key}.{name}" for name in (*TENSORS, *map(_state_name, LEVELS)))


def read_4bit_layer(
    key: str, get: Callable[[str], Tensor], keys: Container[str], bias: Tensor | None = None
) -> FrozenLinear:
    """The frozen layer of the 4-bit tensor `key`, bit for bit what bitsandbytes loads; `get` fetches a tensor by name.

    BaseModelError, naming the key, if a tensor is missing or the tensors don't match each other.
    """
    kind = next((kind for kind in LEVELS if f"{key}.{_state_name(kind)}" in keys), None)
    if kind is None:
        raise BaseModelError(f"{key}: is not stored in 4 bits: there is no {key}.{_state_name('nf4')}.")
    state_key = f"{key}.{_state_name(kind)}"
    state = QuantState.parse(state_key, kind, get(state_key))
    tensors = {name: get(f"{key}.{name}") for name in TENSORS if f"{key}.{name}" in keys}
    stored = _stored_tensors(key, state, get(key), tensors)
    return FourBitLinear(kind, state.block, state.shape, stored, bias)


def refuse_kept(quantizer: Quantizer, path: str, folder: Path) -> None:
    """BaseModelError if `quant.keep` names a matrix that a checkpoint stores in 4 bits."""
    if isinstance(quantizer, Keeping) and quantizer.keeps(path):
        raise BaseModelError(
            f"quant.keep: {path} is stored in 4 bits in {folder}: there are no 16 bits to keep. Remove quant.keep, or "
            "use the 16-bit checkpoint."
        )


@dataclass(frozen=True)
class QuantState:
    """The JSON of one 4-bit tensor, checked."""

    kind: str
    shape: tuple[int, int]
    block: int
    offset: float | None  # None: absmax is not quantized

    @classmethod
    def parse(cls, key: str, kind: str, packed: Tensor) -> "QuantState":
        """Read the JSON tensor named `key`. BaseModelError for a value that no checkpoint can have."""
        fields = _json(key, packed)
        block = fields.get("blocksize")
        _check(key, "quant_type", fields, fields.get("quant_type") == kind, kind)
        _check(key, "blocksize", fields, _is_positive_int(block) and block in BLOCKS, BLOCKS)
        shape: Any = fields.get("shape")
        valid = isinstance(shape, list) and len(shape) == 2 and all(_is_positive_int(size) for size in shape)
        _check(key, "shape", fields, valid, "[out, in], both positive")
        if "nested_offset" not in fields:
            return cls(kind, (shape[0], shape[1]), fields["blocksize"], None)
        offset = fields["nested_offset"]
        _check(key, "nested_offset", fields, _is_float32(offset), "a finite float32")
        _check(key, "nested_blocksize", fields, fields.get("nested_blocksize") == NESTED_BLOCK, NESTED_BLOCK)
        _check(key, "nested_dtype", fields, fields.get("nested_dtype") == "float32", "float32")
        return cls(kind, (shape[0], shape[1]), fields["blocksize"], float(offset))


def _stored_tensors(key: str, state: QuantState, packed: Tensor, tensors: Mapping[str, Tensor]) -> FourBitTensors:
    """The tensors as FourBitLinear stores them, every size and dtype checked against the shape."""
    weights = state.shape[0] * state.shape[1]
    blocks = -(-weights // state.block)
    codes = packed.contiguous().reshape(-1).view(torch.uint8)
    if codes.numel() != -(-weights // 2):
        raise BaseModelError(f"{key}: {codes.numel()} bytes, but shape {list(state.shape)} takes {-(-weights // 2)}.")
    _checked(key, "quant_map", tensors, torch.float32, 16)
    if not torch.allclose(tensors["quant_map"].cpu(), LEVELS[state.kind](), rtol=0, atol=1e-3):
        raise BaseModelError(f"{key}.quant_map: these are not the 16 levels of {state.kind}.")
    if state.offset is None:
        return FourBitTensors(codes, _checked(key, "absmax", tensors, torch.float32, blocks))
    absmax = _checked(key, "absmax", tensors, torch.uint8, blocks)
    nested_absmax = _checked(key, "nested_absmax", tensors, torch.float32, -(-blocks // NESTED_BLOCK))
    levels = _checked(key, "nested_quant_map", tensors, torch.float32, 256)
    offset = torch.tensor([state.offset], device=codes.device)
    # Older versions of bitsandbytes rounded some levels differently: these are kept.
    differs = not torch.equal(levels.cpu(), dynamic_levels())
    return FourBitTensors(codes, absmax, nested_absmax, offset, levels if differs else None)


def _checked(key: str, name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype, count: int) -> Tensor:
    """The tensor `name`. BaseModelError unless it exists and has `count` finite values of type `dtype`."""
    if name not in tensors:
        raise BaseModelError(f"{key}.{name}: is missing from the checkpoint; a 4-bit weight can't be read without it.")
    tensor = tensors[name]
    if tensor.dtype != dtype or tensor.numel() != count:
        actual = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise BaseModelError(f"{key}.{name}: found {actual}, allowed: {str(dtype).removeprefix('torch.')} [{count}].")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise BaseModelError(f"{key}.{name}: holds NaN or infinity. Is the checkpoint file damaged?")
    return tensor.reshape(-1)


def _state_name(kind: str) -> str:
    return f"quant_state.bitsandbytes__{kind}"


def _json(key: str, packed: Tensor) -> dict[str, Any]:
    """The JSON object whose text a uint8 tensor holds."""
    if packed.dtype != torch.uint8 or packed.numel() > MAX_STATE_BYTES:
        raise BaseModelError(
            f"{key}: found {packed.dtype} {list(packed.shape)}, allowed: JSON of at most {MAX_STATE_BYTES} bytes."
        )
    try:
        fields = json.loads(bytes(packed.reshape(-1).tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise BaseModelError(f"{key}: is not JSON ({error}). Is the checkpoint file damaged?") from error
    if not isinstance(fields, dict):
        kind = type(fields).__name__
        raise BaseModelError(f"{key}: found JSON of a {kind}, allowed: an object with shape and blocksize.")
    return fields


def _check(key: str, name: str, fields: Mapping[str, Any], valid: bool, allowed: object) -> None:
    if not valid:
        problem = f"{name} is {_short(fields[name])}" if name in fields else f"{name} is missing"
        raise BaseModelError(f"{key}: {problem}; allowed: {allowed}. Is the checkpoint file damaged?")


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_float32(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= torch.finfo(torch.float32).max


def _short(value: object) -> str:
    """A value of any type in at most 80 printable characters."""
    flat = not isinstance(value, dict) and not (
        isinstance(value, list) and any(isinstance(item, list | dict) for item in value)
    )
    return ascii(value)[:80] if flat else f"a nested {type(value).__name__}"
