"""A released quantized checkpoint that can't be decoded is refused by file and tensor, with what was expected."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.released_formats import WRITERS, change_config, write_released
from torch import Tensor

from qlora.errors import BaseModelError
from qlora.model import Model
from qlora.model.load_base import load
from qlora.quant import Quant, build_quantizer

UP = "model.layers.1.mlp.up_proj"  # [96, 64]
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def source(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tensors]:
    """`source("gptq")`: the tensors of a tiny Llama in a released format."""
    folder, tensors = tmp_path_factory.mktemp("released"), dict[str, Tensors]()

    def read(writer: str) -> Tensors:
        if writer not in tensors:
            write_released(zoo("llama"), folder / writer, writer)
            tensors[writer] = load_file(folder / writer / "model.safetensors")
        return dict(tensors[writer])

    return read


def refusal(zoo: Any, folder: Path, tensors: Tensors, **quantization: Any) -> str:
    """The message for a folder with these tensors."""
    folder.mkdir()
    for file in zoo("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    change_config(folder, quantization_config=quantization)
    with pytest.raises(BaseModelError) as caught:
        load(Model(name=str(folder)), build_quantizer(Quant()), torch.device("cpu"))
    message = str(caught.value)
    assert message.startswith(f"model: {folder}") and "\n" not in message and len(message) < 600, message
    return message


def with_value(key: str, index: Any, value: float) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        changed = tensors[key].clone()
        changed[index] = value
        return tensors | {key: changed}

    return change


def with_tensor(key: str, make: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {key: make(tensors[key])}


def without(key: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key}


@pytest.mark.sample(of=4, every=("writer",))
@pytest.mark.parametrize(
    ("writer", "change", "expected"),
    [
        ("fp8-blocks", without(f"{UP}.weight_scale_inv"), f"'{UP}.weight' is stored as float8_e4m3fn, without"),
        ("fp8-blocks", with_tensor(f"{UP}.weight_scale_inv", lambda t: t[:, :-1].repeat(1, 7)),
         f"'{UP}.weight_scale_inv' is [3, 7], expected scales that divide a matrix [96, 64] into equal blocks, "
         "or of blocks [32, 32]"),
        ("fp8-blocks", with_value(f"{UP}.weight_scale_inv", (0, 0), torch.nan),
         f"'{UP}.weight_scale_inv' holds NaN or infinity, expected finite scales"),
        ("fp8-blocks", with_value(f"{UP}.weight", (0, 0), torch.nan), f"'{UP}.weight'"),
        ("fp8-blocks", with_tensor(f"{UP}.weight", lambda t: t.view(torch.uint8)), "is stored as uint8, without"),
        ("fp8-channel", with_tensor(f"{UP}.weight", lambda t: t[0]), "is [64], expected [out, in]"),
        ("mxfp4", with_tensor(f"{UP}.weight_scale", lambda t: t[:, :-1]), "is [96, 1], expected [96, 2]"),
        ("mxfp4", with_value(f"{UP}.weight_scale", (3, 1), 255), "holds NaN"),
        ("mxfp4", without(f"{UP}.weight_scale"), f"can't be decoded without {UP}.weight_scale, which is missing"),
        ("nvfp4", without(f"{UP}.weight_global_scale"), f"without {UP}.weight_global_scale"),
        ("nvfp4", with_value(f"{UP}.weight_global_scale", 0, 0), "holds NaN or infinity"),
        ("nvfp4-modelopt", with_tensor(f"{UP}.weight_scale_2", lambda t: t.repeat(2)), "is [2], expected one number"),
        ("nvfp4-modelopt", with_tensor(f"{UP}.weight_scale", lambda t: t[1:]), "is [95, 4], expected [96, 4]"),
        ("pack", without(f"{UP}.weight_scale"), f"without {UP}.weight_scale, which is missing"),
        ("pack", without(f"{UP}.weight_shape"), f"without {UP}.weight_shape, which is missing"),
        ("pack", with_tensor(f"{UP}.weight_shape", lambda t: t[:1]), "is [1], expected two sizes"),
        ("pack", with_value(f"{UP}.weight_shape", 1, 999), "is [96, 8], expected [96, 125] (4 bits)"),
        ("pack", with_tensor(f"{UP}.weight_zero_point", lambda t: t[1:]), "is [11, 2], expected [12, 2] (4 bits"),
        ("pack", with_tensor(f"{UP}.weight_scale", lambda t: t.repeat(1, 5)), "is [96, 10], expected scales"),
        ("int", without(f"{UP}.weight_scale"), f"'{UP}.weight' is stored as int8, without"),
        ("int", with_tensor(f"{UP}.weight_scale", lambda t: t[1:]), "is [95, 1], expected scales"),
        ("awq", without(f"{UP}.qzeros"), f"without {UP}.qzeros, which is missing"),
        ("awq", with_tensor(f"{UP}.scales", lambda t: t[:, 1:]), "is [2, 95], expected [groups, 96]"),
        ("gptq", without(f"{UP}.scales"), f"without {UP}.scales, which is missing"),
        ("gptq", with_tensor(f"{UP}.qzeros", lambda t: t[:, 1:]), "is [2, 11], expected [2, 96 * bits / 32]"),
        ("gptq", with_value(f"{UP}.g_idx", 0, 2), "holds groups 0 to 2, expected 0 to 1"),
        ("gptq", with_tensor(f"{UP}.g_idx", lambda t: t[1:]), "is [63], expected [64] (a group for each input)"),
        ("gptq", with_value(f"{UP}.scales", (0, 0), torch.inf), "holds NaN or infinity"),
        ("gptq", lambda tensors: tensors | {f"{UP}.weight": torch.ones(96, 64)}, "is stored twice"),
        ("gptq", without(f"{UP}.qweight"), f"lacks {UP}.weight"),
        ("llm-int8", with_tensor(f"{UP}.SCB", lambda t: t[1:]), "is [95], expected [96]"),
        ("llm-int8", with_tensor(f"{UP}.weight_format", lambda t: t + 1), "is 1, expected 0: row-major"),
    ],
)  # fmt: skip
def test_damaged_tensors(
    zoo: Any, source: Callable[[str], Tensors], tmp_path: Path, writer: str, change: Any, expected: str
) -> None:
    assert expected in refusal(zoo, tmp_path / "model", change(source(writer)), **WRITERS[writer][1])


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"quant_method": "aqlm"}, "quant_method: found 'aqlm', which can't be decoded; allowed: auto-round, awq"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format: found 'marlin'"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "checkpoint_format: found 'marlin'"),
        ({"quant_method": "awq", "version": "gemv"}, "version: found 'gemv', which can't be decoded; allowed: gemm"),
        ({"quant_method": "auto-round", "packing_format": "auto_round"}, "packing_format: found 'auto_round'"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format: found 'marlin-24'"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"format": "mxfp6-pack-quantized"}}}, "mxfp6"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
         "sparsity_config.format: found 'sparse-24-bitmask'"),
        ({"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    ],
)  # fmt: skip
def test_unknown_settings(
    zoo: Any, source: Callable[[str], Tensors], tmp_path: Path, quantization: Any, expected: str
) -> None:
    message = refusal(zoo, tmp_path / "model", source("gptq"), **quantization)
    assert expected in message and "16-bit checkpoint" in message
