"""Small writers of released quantized formats: the tensors of one matrix, and a model folder with all of them so."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora.model.linear_layers import linear_paths
from qlora.model.meta_model import build_meta_model, read_config
from qlora.model.open_checkpoint import open_checkpoint

Encoded = dict[str, Tensor]  # what follows the module's path in a key -> tensor
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP8 = torch.float8_e4m3fn

NAMES = {
    torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.float32: "F32",
    torch.bfloat16: "BF16", torch.float16: "F16", FP8: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class Files(dict[str, Tensor]):
    """Tensors of a checkpoint in memory."""

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self[key].shape)

    def dtype(self, key: str) -> str:
        return NAMES[self[key].dtype]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, K] as int32 words [N, K * bits / 32], lowest bits first."""
    fields = codes.long().reshape(len(codes), -1, 32 // bits)
    words = (fields << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def pack_e2m1(values: Tensor) -> Tensor:
    """The nearest e2m1 floats of `values` [O, I], two a byte."""
    codes = (values.abs().unsqueeze(-1) - E2M1).abs().argmin(-1) + 8 * (values < 0)
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)


def asymmetric(weight: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [O, I], zero points and scales [O, G] of groups of columns."""
    parts = weight.reshape(len(weight), -1, group)
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half()
    zero = (-low / scale).round().clamp(1, 2**bits - 1)  # 1: layout `gptq` can't store 0
    codes = (parts / scale.unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, 2**bits - 1)
    return codes.flatten(1).int(), zero.int(), scale


def fp8_blocks(weight: Tensor) -> Encoded:
    blocks = weight.unfold(0, 32, 32).unfold(1, 32, 32).abs().amax((2, 3)) / 448
    spread = blocks.repeat_interleave(32, 0).repeat_interleave(32, 1)
    return {"weight": (weight / spread).to(FP8), "weight_scale_inv": blocks}


def fp8_tensor(weight: Tensor) -> Encoded:
    scale = (weight.abs().amax() / 448).bfloat16()
    activation = {"activation_scale": torch.tensor(0.1).bfloat16()}
    return {"weight": (weight / scale.float()).to(FP8), "weight_scale_inv": scale, **activation}


def fp8_channel(weight: Tensor) -> Encoded:
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {"weight": (weight / scale).to(FP8), "weight_scale": scale, "input_scale": torch.tensor(0.1)}


def mxfp4(weight: Tensor) -> Encoded:
    parts = weight.reshape(len(weight), -1, 32)
    exponent = parts.abs().amax(-1).log2().floor() - 2
    scaled = parts / exponent.exp2().unsqueeze(-1)
    return {"weight_packed": pack_e2m1(scaled.flatten(1)), "weight_scale": (exponent + 127).to(torch.uint8)}


def mxfp4_experts(stack: Tensor) -> Encoded:
    """The blocks and scales of experts that a 16-bit checkpoint holds as [E, I, O]."""
    experts = [mxfp4(matrix.t()) for matrix in stack]
    blocks = torch.stack([expert["weight_packed"].unflatten(1, (-1, 16)) for expert in experts])
    return {"blocks": blocks, "scales": torch.stack([expert["weight_scale"] for expert in experts])}


def nvfp4(weight: Tensor) -> Encoded:
    whole = weight.abs().amax() / (6 * 448)
    parts = weight.reshape(len(weight), -1, 16)
    scale = (parts.abs().amax(-1) / 6 / whole).to(FP8)
    packed = pack_e2m1((parts / (scale.float() * whole).unsqueeze(-1)).flatten(1))
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": whole, "input_scale": torch.tensor(0.1)}


def nvfp4_compressed(weight: Tensor) -> Encoded:
    encoded = nvfp4(weight)
    whole = (1 / encoded["weight_scale_2"]).reshape(1)
    return {
        "weight_packed": encoded["weight"], "weight_scale": encoded["weight_scale"], "weight_global_scale": whole,
        "input_global_scale": torch.tensor([0.1]),
    }  # fmt: skip


def packed_integers(weight: Tensor) -> Encoded:
    codes, zero, scale = asymmetric(weight, 32, 4)
    return {
        "weight_packed": pack(codes, 4), "weight_scale": scale.bfloat16(), "weight_shape": torch.tensor(weight.shape),
        "weight_zero_point": pack(zero.t(), 4).t().contiguous(),
    }  # fmt: skip


def integers(weight: Tensor) -> Encoded:
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    return {"weight": (weight / scale.float()).round().clamp(-128, 127).to(torch.int8), "weight_scale": scale}


def awq(weight: Tensor) -> Encoded:
    codes, zero, scale = asymmetric(weight, 32, 4)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def words(values: Tensor) -> Tensor:
        return pack(values.t().reshape(values.shape[1], -1, 8)[:, :, order].flatten(1), 4)

    return {"qweight": words(codes), "qzeros": words(zero), "scales": scale.t().contiguous()}


def gptq(weight: Tensor, bits: int = 4, offset: int = 1) -> Encoded:
    codes, zero, scale = asymmetric(weight, 32, bits)
    return {
        "qweight": pack(codes, bits).t().contiguous(), "qzeros": pack((zero - offset).t(), bits),
        "scales": scale.t().contiguous(), "g_idx": (torch.arange(weight.shape[1]) // 32).int(),
    }  # fmt: skip


def gptq_v2(weight: Tensor) -> Encoded:
    return gptq(weight, 8, 0)


def llm_int8(weight: Tensor) -> Encoded:
    scale = weight.abs().amax(1)
    codes = (weight * (127 / scale).unsqueeze(1)).round().to(torch.int8)
    return {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def _compressed(form: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors", "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": dict(weights)}},
    }  # fmt: skip


# Name -> encoder, `quantization_config`, and the kind in qlora.quant.released.FORMATS.
WRITERS: dict[str, tuple[Callable[[Tensor], Encoded], dict[str, Any], str]] = {
    "fp8-blocks": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [32, 32]}, "fp8"),
    "fp8-tensor": (fp8_tensor, {"quant_method": "fp8", "activation_scheme": "static"}, "fp8"),
    "fp8-channel": (fp8_channel, _compressed("float-quantized", {"num_bits": 8, "type": "float"}), "fp8"),
    "mxfp4": (mxfp4, _compressed("mxfp4-pack-quantized", {"num_bits": 4, "type": "float"}), "mxfp4"),
    "nvfp4-modelopt": (nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
    "nvfp4": (nvfp4_compressed, _compressed("nvfp4-pack-quantized", {"num_bits": 4, "type": "float"}), "nvfp4"),
    "pack": (packed_integers, _compressed("pack-quantized", {"num_bits": 4, "type": "int"}), "pack_quantized"),
    "int": (integers, _compressed("int-quantized", {"num_bits": 8, "type": "int"}), "int_quantized"),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq"),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq"}, "gptq"),
    "gptq-v2": (gptq_v2, {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"}, "gptq"),
    "llm-int8": (llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "llm_int8"),
}


def write_released(source: Path, folder: Path, writer: str) -> Path:
    """The model in `source` with the matrices of its decoder in a released format."""
    encode, quantization, _ = WRITERS[writer]
    shutil.copytree(source, folder)
    skeleton = build_meta_model(read_config(source), torch.float32, "auto", torch.device("cpu"))
    linears, tensors = set(linear_paths(skeleton)), dict[str, Tensor]()
    for key, tensor in load_file(source / "model.safetensors").items():
        path = key.removesuffix(".weight")
        encoded = encode(tensor.float()) if path in linears and key != path else {"": tensor}
        tensors |= {f"{path}.{name}" if name else key: value.contiguous() for name, value in encoded.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config=quantization)
    return folder


def write_decoded(released: Path, folder: Path) -> Path:
    """The model in `released` with every tensor decoded: an ordinary checkpoint."""
    shutil.copytree(released, folder)
    tensors = {key: tensor.clone() for key, tensor in open_checkpoint(released).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config=None)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
