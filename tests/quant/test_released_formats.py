"""Released formats decode bit for bit what transformers decodes, or the format's published formula.

Codes and scales are random bits: every code of a format occurs, not only those that a quantizer writes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from support.released_formats import FP8, Files
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

from qlora.quant.released import FORMATS
from qlora.quant.released.find_released import find_released
from qlora.quant.released.settings import QuantizationSettings

ROWS, COLUMNS = 80, 96
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def decode(tensors: Mapping[str, Tensor], dtype: torch.dtype, config: Mapping[str, Any], kind: str) -> Tensor:
    """The only tensor that the parts of a checkpoint are decoded to."""
    files = Files(tensors)
    ((key, tensor),) = find_released(files, QuantizationSettings.parse({"quantization_config": config})).items()
    assert key == tensor.key and tensor.kind == kind
    decoded = tensor.dequantize({role: files[part] for role, part in tensor.parts.items()}, dtype)
    assert decoded.dtype == dtype and tuple(decoded.shape) == tensor.shape
    return decoded


def words(*shape: int) -> Tensor:
    """Random int32."""
    return torch.randint(-(2**31), 2**31, shape).int()


def fields(word_row: Tensor, bits: int, count: int) -> Iterator[int]:
    """The fields of a row of int32 words, read from one long integer."""
    row = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(word_row.tolist()))
    return (row >> (bits * index) & (2**bits - 1) for index in range(count))


def matrix_of(words_by_row: Tensor, bits: int, count: int) -> Tensor:
    return torch.tensor([[*fields(row, bits, count)] for row in words_by_row])


def e2m1_matrix(packed: Tensor) -> Tensor:
    """Two values a byte, the low nibble first."""
    rows = [[FP4_VALUES[nibble] for byte in row for nibble in (byte & 15, byte >> 4)] for row in packed.tolist()]
    return torch.tensor(rows)


def scale_of_dtype(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.rand(shape) / 20 + 1e-3).to(dtype)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def fp8_codes(*shape: int) -> Tensor:
    """Every code but NaN."""
    codes = torch.randint(0, 256, shape).to(torch.uint8)
    return torch.where(codes % 128 == 127, torch.zeros_like(codes), codes).view(FP8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "scale",
    [
        torch.rand(5, 3), torch.rand(5, 3).bfloat16(), torch.rand(()), torch.rand(1), torch.rand(ROWS, 1),
        torch.randint(0, 255, (ROWS, 3)).to(torch.uint8),
        torch.randint(0, 255, (ROWS, 3)).to(torch.uint8).view(torch.float8_e8m0fnu),
    ],
    ids=lambda scale: f"{list(scale.shape)} {scale.dtype}",
)  # fmt: skip
@pytest.mark.parametrize("codes", [FP8, torch.float8_e5m2])
def test_fp8_is_what_transformers_decodes(codes: torch.dtype, scale: Tensor, dtype: torch.dtype) -> None:
    weight = fp8_codes(ROWS, COLUMNS) if codes == FP8 else torch.randn(ROWS, COLUMNS).to(codes)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale.reshape(-1, 1) if scale.dim() < 2 else scale, dtype)
    decoded = decode({"x.weight": weight, "x.weight_scale_inv": scale}, dtype, {"quant_method": "fp8"}, "fp8")
    assert torch.equal(decoded, expected)


@pytest.mark.parametrize("name", ["x.weight_scale", "x.scale", "x.qscale_weight"])
def test_fp8_scales_have_other_names_too(name: str) -> None:
    weight, scale = fp8_codes(ROWS, COLUMNS), torch.rand(ROWS)
    expected = (weight.float() * scale.unsqueeze(1)).bfloat16()
    assert torch.equal(decode({"x.weight": weight, name: scale}, torch.bfloat16, {}, "fp8"), expected)


@pytest.mark.parametrize(("rows", "block"), [(80, 32), (96, 40)])
def test_last_blocks_of_fp8_may_be_shorter(rows: int, block: int) -> None:
    """As kv_a_proj of DeepSeek, which transformers itself refuses; the block that is named counts, not an even one."""
    weight, scale = fp8_codes(rows, COLUMNS), torch.rand(3, 4)
    by_weight = [[float(scale[row // block, column // 25]) for column in range(COLUMNS)] for row in range(rows)]
    config = {"quant_method": "fp8", "weight_block_size": [block, 25]}
    decoded = decode({"x.weight": weight, "x.weight_scale_inv": scale}, torch.float32, config, "fp8")
    assert torch.equal(decoded, weight.float() * torch.tensor(by_weight))
    four = scale.view(3, 1, 4, 1)  # modelopt
    assert torch.equal(decoded, decode({"x.weight": weight, "x.weight_scale": four}, torch.float32, config, "fp8"))


def test_fp8_scales_in_16_bits_round_the_product_as_the_reference_does() -> None:
    weight, scale = fp8_codes(ROWS, COLUMNS), torch.rand(ROWS, 1).bfloat16()
    expected = (weight.to(torch.bfloat16) * scale).float()
    assert torch.equal(decode({"x.weight": weight, "x.weight_scale": scale}, torch.float32, {}, "fp8"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_of_experts_is_what_transformers_decodes(dtype: torch.dtype) -> None:
    blocks, scales = torch.randint(0, 256, (3, 8, 2, 16)).to(torch.uint8), torch.randint(0, 255, (3, 8, 2))
    files = Files({"e.gate_up_proj_blocks": blocks, "e.gate_up_proj_scales": scales.to(torch.uint8)})
    (tensor,) = find_released(files, QuantizationSettings()).values()
    expected = convert_moe_packed_tensors(blocks, scales.to(torch.uint8), dtype=dtype)
    assert (tensor.key, tensor.shape) == ("e.gate_up_proj", tuple(expected.shape))
    for expert in range(3):
        parts = {role: files[key][expert] for role, key in tensor.parts.items()}
        assert torch.equal(tensor.dequantize(parts, dtype), expected[expert])


@pytest.mark.parametrize(
    ("codes", "scale"), [("weight_packed", "weight_scale"), ("weight", "scale"), ("weight", "weight_scale_inv")]
)
def test_mxfp4_of_matrices_is_what_transformers_decodes(codes: str, scale: str) -> None:
    packed, exponents = torch.randint(0, 256, (ROWS, 48)).to(torch.uint8), torch.randint(0, 255, (ROWS, 3))
    scales = exponents.to(torch.uint8).view(torch.float8_e8m0fnu)
    expected = Fp8Dequantize(None)._dequantize_one(packed.view(torch.int8), scales, torch.bfloat16)
    tensors = {f"x.{codes}": packed, f"x.{scale}": scales.view(torch.uint8) if "packed" in codes else scales}
    assert torch.equal(decode(tensors, torch.bfloat16, {}, "mxfp4"), expected)


def test_nvfp4_of_both_writers_is_the_published_formula() -> None:
    packed, scale, whole = torch.randint(0, 256, (ROWS, 48)).to(torch.uint8), torch.rand(ROWS, 6), torch.rand(1)
    scale = (scale * 448).to(FP8)
    values = e2m1_matrix(packed)
    multiplied = values * (scale.float() * whole).repeat_interleave(16, 1)
    modelopt = {"x.weight": packed, "x.weight_scale": scale, "x.weight_scale_2": whole.reshape(())}
    assert torch.equal(decode(modelopt, torch.float32, {}, "nvfp4"), multiplied)
    divided = (values.bfloat16().float() * (scale.bfloat16() / whole).repeat_interleave(16, 1)).bfloat16()
    compressed = {"x.weight_packed": packed, "x.weight_scale": scale, "x.weight_global_scale": whole}
    assert torch.equal(decode(compressed, torch.float32, {}, "nvfp4"), divided.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("groups", [1, 3])
def test_packed_integers_are_the_published_formula(groups: int, bits: int, dtype: torch.dtype) -> None:
    packed, zeros = words(ROWS, -(-COLUMNS * bits // 32)), words(-(-ROWS * bits // 32), groups)
    scale = scale_of_dtype(ROWS, groups, dtype=dtype)
    codes = matrix_of(packed, bits, COLUMNS) - 2 ** (bits - 1)
    zero = matrix_of(zeros.t(), bits, ROWS).t() - 2 ** (bits - 1)
    group = torch.arange(COLUMNS) // (COLUMNS // groups)
    config = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": bits}}}}
    tensors = {"x.weight_packed": packed, "x.weight_scale": scale, "x.weight_shape": torch.tensor([ROWS, COLUMNS])}
    expected = (codes.to(dtype) * scale[:, group]).bfloat16()
    assert torch.equal(decode(tensors, torch.bfloat16, config, "pack_quantized"), expected)
    expected = ((codes.to(dtype) - zero.to(dtype)[:, group]) * scale[:, group]).bfloat16()
    tensors["x.weight_zero_point"] = zeros
    assert torch.equal(decode(tensors, torch.bfloat16, config, "pack_quantized"), expected)
    tensors["x.weight_g_idx"] = torch.randint(0, groups, (COLUMNS,)).int()
    group = tensors["x.weight_g_idx"].long()
    expected = ((codes.to(dtype) - zero.to(dtype)[:, group]) * scale[:, group]).bfloat16()
    assert torch.equal(decode(tensors, torch.bfloat16, config, "pack_quantized"), expected)


@pytest.mark.parametrize("scales", [(1,), (ROWS, 1), (ROWS, 3)])
def test_integers_are_the_published_formula(scales: tuple[int, ...]) -> None:
    weight, scale = torch.randint(-128, 128, (ROWS, COLUMNS)).to(torch.int8), scale_of_dtype(*scales)
    zero = torch.randint(-128, 128, scales).to(torch.int8)
    spread = torch.ones(ROWS, COLUMNS, dtype=torch.long) * (torch.arange(COLUMNS) // 32 if scales[-1] == 3 else 0)
    by_weight = [part.expand(ROWS, -1).gather(1, spread) for part in (scale, zero)]
    expected = (weight.half() - by_weight[1].half()) * by_weight[0]
    tensors = {"x.weight": weight, "x.weight_scale": scale, "x.weight_zero_point": zero}
    assert torch.equal(decode(tensors, torch.float16, {}, "int_quantized"), expected)


def test_awq_is_the_published_formula() -> None:
    qweight, qzeros, scales = words(COLUMNS, ROWS // 8), words(3, ROWS // 8), scale_of_dtype(3, ROWS)
    position = [0, 4, 1, 5, 2, 6, 3, 7]  # of an output in its word

    def outputs(packed: Tensor) -> Tensor:
        nibbles = matrix_of(packed, 4, ROWS)
        return nibbles[:, [output // 8 * 8 + position[output % 8] for output in range(ROWS)]]

    group = torch.arange(COLUMNS) // 32
    expected = ((outputs(qweight) - outputs(qzeros)[group]).half() * scales[group]).t()
    tensors = {"x.qweight": qweight, "x.qzeros": qzeros, "x.scales": scales}
    assert torch.equal(decode(tensors, torch.float16, {"quant_method": "awq"}, "awq"), expected)


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_the_published_formula(bits: int, layout: str) -> None:
    rows = 96
    qweight, qzeros = words(COLUMNS * bits // 32, rows), words(3, rows * bits // 32)
    scales = scale_of_dtype(3, rows)
    codes, zero = matrix_of(qweight.t(), bits, COLUMNS), matrix_of(qzeros, bits, rows)
    if layout == "gptq" and bits != 3:  # as gptqmodel adds: to whole words, which carries
        zero = matrix_of((qzeros.long() + 0xFFFFFFFF // (2**bits - 1)).int(), bits, rows)
    elif layout == "gptq":
        zero = (zero + 1) % 8
    tensors = {"x.qweight": qweight, "x.qzeros": qzeros, "x.scales": scales}
    config = {"quant_method": "gptq", "bits": bits, "checkpoint_format": layout}
    group = torch.arange(COLUMNS) // 32
    expected = (codes - zero.t()[:, group]).half() * scales.t()[:, group]
    assert torch.equal(decode(tensors, torch.float16, config, "gptq"), expected)
    group = torch.randint(0, 3, (COLUMNS,))
    expected = (codes - zero.t()[:, group]).half() * scales.t()[:, group]
    decoded = decode(tensors | {"x.g_idx": group.int()}, torch.float16, config, "gptq")
    assert torch.equal(decoded, expected)


def test_llm_int8_is_what_bitsandbytes_decodes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight, scale = torch.randint(-127, 128, (ROWS, COLUMNS)).to(torch.int8), torch.rand(ROWS)
    expected = bnb.functional.int8_vectorwise_dequant(weight, scale).bfloat16()
    assert torch.equal(decode({"x.weight": weight, "x.SCB": scale}, torch.bfloat16, {}, "llm_int8"), expected)


def test_auto_round_names_its_packing() -> None:
    tensors = {"x.qweight": words(12, 96), "x.qzeros": words(3, 12), "x.scales": scale_of_dtype(3, 96)}
    for packing, kind in (("auto_round:auto_gptq", "gptq"), ("auto_round:auto_awq", "awq")):
        shapes = tensors if kind == "gptq" else tensors | {"x.qweight": words(96, 12)}
        decode(shapes, torch.float16, {"quant_method": "auto-round", "packing_format": packing}, kind)


def test_every_format_is_tested() -> None:
    assert set(FORMATS) == {
        "fp8", "mxfp4", "nvfp4", "pack_quantized", "int_quantized", "awq", "gptq", "llm_int8",
    }  # fmt: skip
    assert all(FORMATS[kind].kind == kind for kind in FORMATS)
