"""bitsandbytes 4-bit checkpoints, as they are found on the hub.

Beside a packed `{P}.weight` lie its scales and one JSON tensor, whose name says that it is 4-bit and which kind:

    {P}.weight                                    packed codes: uint8 [ceil(O*I/2), 1], or these bytes in another type
    {P}.weight.absmax                             float32 [N], or uint8 [N] when itself quantised
    {P}.weight.quant_map                          float32 [16], the levels
    {P}.weight.nested_absmax, .nested_quant_map   float32 [ceil(N/256)], [256]; only when absmax is quantised
    {P}.weight.quant_state.bitsandbytes__nf4      uint8: JSON with shape, blocksize, and the offset of nested ones

The keys decide, tensor by tensor; config.json is not asked. Nothing is quantised anew, so no bit changes.
"""

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora.errors import BaseModelError
from qlora.quant.blockwise import dynamic_levels
from qlora.quant.fourbit import BLOCKS, NESTED_BLOCK, FourBitLinear, FourBitTensors
from qlora.quant.levels import LEVELS
from qlora.quant.linear import FrozenLinear

TENSORS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
LONGEST_STATE = 4096  # bytes of JSON; real ones have about 200


def is_prequantized(key: str, keys: Container[str]) -> bool:
    """Whether `key` ("model.layers.0.mlp.up_proj.weight") is stored in 4 bits, judged by the checkpoint's `keys`."""
    return any(f"{key}.{_state(kind)}" in keys for kind in LEVELS)


def companions(key: str) -> tuple[str, ...]:
    """Every name that may lie beside a 4-bit `key` and is read along with it."""
    return tuple(f"{key}.{name}" for name in (*TENSORS, *map(_state, LEVELS)))


def read(key: str, get: Callable[[str], Tensor], keys: Container[str], bias: Tensor | None = None) -> FrozenLinear:
    """The frozen layer of the 4-bit tensor `key`, bit for bit what bitsandbytes loads; `get` fetches a tensor by name.

    BaseModelError, naming the key, if a part is missing or the parts don't fit each other.
    """
    kind = next((kind for kind in LEVELS if f"{key}.{_state(kind)}" in keys), None)
    if kind is None:
        raise BaseModelError(f"{key}: is not stored in 4 bits; no {key}.{_state('nf4')} beside it.")
    state_key = f"{key}.{_state(kind)}"
    state = State.parse(state_key, kind, get(state_key))
    tensors = {name: get(f"{key}.{name}") for name in TENSORS if f"{key}.{name}" in keys}
    stored = _fit(key, state, get(key), tensors)
    return FourBitLinear(kind, state.block, state.shape, stored, bias)


@dataclass(frozen=True)
class State:
    """The JSON of one 4-bit tensor, checked."""

    kind: str
    shape: tuple[int, int]
    block: int
    offset: float | None  # None: absmax is not quantised

    @classmethod
    def parse(cls, key: str, kind: str, packed: Tensor) -> "State":
        """Read the JSON tensor named `key`. BaseModelError if it can't be meant."""
        fields = _json(key, packed)
        _check(key, "quant_type", fields, fields.get("quant_type") == kind, kind)
        _check(key, "blocksize", fields, _is_whole(fields.get("blocksize")) and fields["blocksize"] in BLOCKS, BLOCKS)
        shape: Any = fields.get("shape")
        fits = isinstance(shape, list) and len(shape) == 2 and all(_is_whole(size) for size in shape)
        _check(key, "shape", fields, fits, "[out, in], both positive")
        if "nested_offset" not in fields:
            return cls(kind, (shape[0], shape[1]), fields["blocksize"], None)
        offset = fields["nested_offset"]
        _check(key, "nested_offset", fields, _is_float32(offset), "a finite float32")
        _check(key, "nested_blocksize", fields, fields.get("nested_blocksize") == NESTED_BLOCK, NESTED_BLOCK)
        _check(key, "nested_dtype", fields, fields.get("nested_dtype") == "float32", "float32")
        return cls(kind, (shape[0], shape[1]), fields["blocksize"], float(offset))


def _fit(key: str, state: State, packed: Tensor, tensors: Mapping[str, Tensor]) -> FourBitTensors:
    """The stored tensors in our layout, after every size and type has been checked against the shape."""
    weights = state.shape[0] * state.shape[1]
    blocks = -(-weights // state.block)
    codes = packed.contiguous().reshape(-1).view(torch.uint8)
    if codes.numel() != -(-weights // 2):
        raise BaseModelError(f"{key}: {codes.numel()} bytes, but shape {list(state.shape)} takes {-(-weights // 2)}.")
    _fits(key, "quant_map", tensors, torch.float32, 16)
    if not torch.allclose(tensors["quant_map"].cpu(), LEVELS[state.kind](), rtol=0, atol=1e-3):
        raise BaseModelError(f"{key}.quant_map: these are not the 16 levels of {state.kind}.")
    if state.offset is None:
        return FourBitTensors(codes, _fits(key, "absmax", tensors, torch.float32, blocks))
    absmax = _fits(key, "absmax", tensors, torch.uint8, blocks)
    nested_absmax = _fits(key, "nested_absmax", tensors, torch.float32, -(-blocks // NESTED_BLOCK))
    levels = _fits(key, "nested_quant_map", tensors, torch.float32, 256)
    offset = torch.tensor([state.offset], device=codes.device)
    own = not torch.equal(
        levels.cpu(), dynamic_levels()
    )  # older versions of bitsandbytes rounded some levels otherwise
    return FourBitTensors(codes, absmax, nested_absmax, offset, levels if own else None)


def _fits(key: str, name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype, count: int) -> Tensor:
    """The tensor `name`, if it is there and has `count` finite values of type `dtype`."""
    if name not in tensors:
        raise BaseModelError(f"{key}.{name}: is missing from the checkpoint; a 4-bit weight can't be read without it.")
    tensor = tensors[name]
    if tensor.dtype != dtype or tensor.numel() != count:
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise BaseModelError(f"{key}.{name}: {found}; needed: {str(dtype).removeprefix('torch.')} [{count}].")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise BaseModelError(f"{key}.{name}: holds NaN or infinity. Is the checkpoint file damaged?")
    return tensor.reshape(-1)


def _state(kind: str) -> str:
    return f"quant_state.bitsandbytes__{kind}"


def _json(key: str, packed: Tensor) -> dict[str, Any]:
    """The JSON object that a uint8 tensor spells."""
    if packed.dtype != torch.uint8 or packed.numel() > LONGEST_STATE:
        raise BaseModelError(
            f"{key}: {packed.dtype} {list(packed.shape)}; needed: JSON as at most {LONGEST_STATE} bytes."
        )
    try:
        fields = json.loads(bytes(packed.reshape(-1).tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise BaseModelError(f"{key}: is not JSON ({error}). Is the checkpoint file damaged?") from error
    if not isinstance(fields, dict):
        raise BaseModelError(f"{key}: JSON of a {type(fields).__name__}; needed: an object with shape and blocksize.")
    return fields


def _check(key: str, name: str, fields: Mapping[str, Any], fits: bool, allowed: object) -> None:
    if not fits:
        found = f"{name} is {_short(fields[name])}" if name in fields else f"{name} is missing"
        raise BaseModelError(f"{key}: {found}; allowed: {allowed}. Is the checkpoint file damaged?")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_float32(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= torch.finfo(torch.float32).max


def _short(value: object) -> str:
    """A value of unknown make, fit for one line of a terminal."""
    flat = not isinstance(value, dict) and not (
        isinstance(value, list) and any(isinstance(v, list | dict) for v in value)
    )
    return ascii(value)[:80] if flat else f"a nested {type(value).__name__}"
