"""bitsandbytes 4-bit checkpoints are read bit for bit; damaged ones are refused by tensor name."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora.errors import BaseModelError
from qlora.model.bnb_checkpoint import companion_keys, is_prequantized, read_4bit_layer
from qlora.quant import Quant, build_quantizer
from qlora.quant.fourbit_linear import FourBitLinear

bnb = pytest.importorskip("bitsandbytes")

KEY = "model.layers.0.mlp.up_proj.weight"
STATE = f"{KEY}.quant_state.bitsandbytes__nf4"


def checkpoint(
    shape: tuple[int, int] = (96, 128),
    kind: str = "nf4",
    double: bool = True,
    storage: torch.dtype = torch.uint8,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """What bitsandbytes.nn.Linear4bit saves for one weight."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) / 9
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=double, quant_type=kind, quant_storage=storage
    )
    companions = {f"{KEY}.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {KEY: packed, **companions}


def as_bitsandbytes_loads(tensors: dict[str, Tensor]) -> Tensor:
    companions = {name.removeprefix(f"{KEY}."): tensor for name, tensor in tensors.items() if name != KEY}
    parameter = bnb.nn.Params4bit.from_prequantized(tensors[KEY], companions, device="cpu")
    return bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)


def checkpoint_with(**changes: Any) -> dict[str, Tensor]:
    """A checkpoint whose JSON has other fields; None removes a field."""
    tensors = checkpoint()
    fields = json.loads(bytes(tensors[STATE].tolist())) | changes
    kept = {name: value for name, value in fields.items() if value is not None}
    return tensors | {STATE: torch.tensor(list(json.dumps(kept).encode()), dtype=torch.uint8)}


def read_from(tensors: dict[str, Tensor], bias: Tensor | None = None) -> FourBitLinear:
    return read_4bit_layer(KEY, tensors.__getitem__, tensors, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_weight_is_bit_for_bit_what_bitsandbytes_loads(
    kind: str, double: bool, storage: torch.dtype, dtype: torch.dtype
) -> None:
    tensors = checkpoint(kind=kind, double=double, storage=storage, dtype=dtype)
    assert is_prequantized(KEY, tensors)
    assert set(tensors) - {KEY} <= set(companion_keys(KEY))
    layer = read_from(tensors, torch.ones(96))
    assert torch.equal(layer.weight(dtype), as_bitsandbytes_loads(tensors))
    assert layer.describe() == {"kind": kind, "shape": [96, 128], "block": 64, "double": double}
    assert layer.bias is not None and layer.bias.sum() == 96


def test_a_read_layer_equals_one_quantized_here() -> None:
    weight = torch.randn((96, 128), generator=torch.Generator().manual_seed(0)).bfloat16() / 9
    quantized, read = build_quantizer(Quant()).quantize(weight).state_dict(), read_from(checkpoint()).state_dict()
    assert quantized.keys() == read.keys()
    assert all(torch.equal(quantized[name], read[name]) for name in quantized)


def test_levels_rounded_by_an_older_version_are_kept() -> None:
    tensors = checkpoint()
    name = f"{KEY}.nested_quant_map"
    tensors[name] = tensors[name] * (1 + 1e-6)
    layer = read_from(tensors)
    assert layer.absmax_levels is not None
    assert torch.equal(layer.weight(torch.bfloat16), as_bitsandbytes_loads(tensors))


def test_a_plain_weight_is_not_prequantized() -> None:
    keys = {KEY, f"{KEY}.absmax", "lm_head.weight", "lm_head.weight.quant_state"}
    assert not is_prequantized(KEY, keys) and not is_prequantized("lm_head.weight", keys)
    with pytest.raises(BaseModelError, match=f"{KEY}: is not stored in 4 bits"):
        read_4bit_layer(KEY, {}.__getitem__, keys)


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_type": "fp4"},
        {"quant_type": None},
        {"blocksize": 63},
        {"blocksize": "64"},
        {"blocksize": True},
        {"blocksize": 10**400},
        {"blocksize": [64]},
        {"shape": None},
        {"shape": [96]},
        {"shape": [96, 128, 1]},
        {"shape": [96, -128]},
        {"shape": [96.0, 128.0]},
        {"shape": [10**300, 10**300]},
        {"shape": {"out": 96}},
        {"shape": [[96], [128]]},
        {"nested_blocksize": 64},
        {"nested_dtype": "float16"},
        {"nested_offset": "0.5"},
        {"nested_offset": 1e39},
        {"nested_offset": 10**400},
        {"nested_offset": float("nan")},
        {"nested_offset": float("inf")},
    ],
    ids=lambda changes: f"{changes}"[:40],
)
def test_an_invalid_field_is_refused_by_name(changes: dict[str, Any]) -> None:
    (field,) = changes
    with pytest.raises(BaseModelError, match=rf"{STATE}: {field} "):
        read_from(checkpoint_with(**changes))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("absmax", None),
        ("absmax", torch.zeros(5, dtype=torch.uint8)),
        ("absmax", torch.zeros(192)),
        ("nested_absmax", None),
        ("nested_absmax", torch.tensor([torch.nan])),
        ("nested_absmax", torch.zeros(2)),
        ("nested_quant_map", torch.zeros(16)),
        ("quant_map", torch.zeros(16)),
        ("quant_map", torch.zeros(15)),
        ("quant_state.bitsandbytes__nf4", torch.zeros(3)),
        ("quant_state.bitsandbytes__nf4", torch.full((10_000,), 91, dtype=torch.uint8)),
        ("quant_state.bitsandbytes__nf4", torch.full((4_000,), 91, dtype=torch.uint8)),  # "[[[[..."
        ("quant_state.bitsandbytes__nf4", torch.tensor([0xFF, 0xFE], dtype=torch.uint8)),
        ("quant_state.bitsandbytes__nf4", torch.tensor(list(b"[]"), dtype=torch.uint8)),
    ],
)
def test_a_missing_or_mismatched_tensor_is_refused_by_name(name: str, tensor: Tensor | None) -> None:
    tensors = checkpoint()
    tensors.pop(f"{KEY}.{name}")
    if tensor is not None:
        tensors[f"{KEY}.{name}"] = tensor
    with pytest.raises(BaseModelError, match=f"{KEY}.{name}"):
        read_from(tensors)


def test_codes_that_do_not_match_the_shape_are_refused() -> None:
    with pytest.raises(BaseModelError, match=r"6144 bytes, but shape \[95, 128\] takes 6080"):
        read_from(checkpoint_with(shape=[95, 128]))


@settings(max_examples=50, deadline=None)
@given(
    text=st.one_of(
        st.binary(max_size=200),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=4)
                | st.dictionaries(
                    st.sampled_from(
                        ["shape", "blocksize", "quant_type", "nested_offset", "nested_blocksize", "nested_dtype"]
                    ),
                    inner | st.sampled_from([64, 256, "nf4", [96, 128]]),
                )
            ),
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_any_json_is_read_or_refused_but_never_crashes(text: bytes) -> None:
    tensors = checkpoint() | {STATE: torch.tensor(list(text), dtype=torch.uint8)}
    try:
        read_from(tensors)
    except BaseModelError as error:
        assert str(error).startswith(KEY) and "\n" not in str(error) and str(error).isprintable()
