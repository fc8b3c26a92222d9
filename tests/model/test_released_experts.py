"""Mixtures of experts that were released quantized give transformers' logits on the decoded weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.released_formats import change_config, fp8_blocks, mxfp4_experts
from support.tiny_models import COMMON, byte_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers import models as zoo
from transformers.utils.quantization_config import Mxfp4Config

from qlora.model import Model
from qlora.model.load_base import load
from qlora.quant import Quant, build_quantizer

SIZES = COMMON | {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 1, "num_experts_per_tok": 2}
IDS = torch.arange(5, 37).unsqueeze(0)


def encoded(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """gpt-oss stores its experts as blocks and scales of a stack, Qwen3-MoE a float8 matrix for each expert."""
    if tensor.dim() == 3:
        return {f"{key}_{name}": part for name, part in mxfp4_experts(tensor.float()).items()}
    if key.endswith("proj.weight") and ".experts." in key:
        return {f"{key.removesuffix('weight')}{name}": part for name, part in fp8_blocks(tensor.float()).items()}
    return {key: tensor}


@pytest.mark.parametrize(
    ("config", "quantization", "decoding"),
    [
        (zoo.gpt_oss.GptOssConfig(**SIZES | {"intermediate_size": 64}, num_local_experts=4, sliding_window=32),
         {"quant_method": "mxfp4"}, Mxfp4Config(dequantize=True)),
        (zoo.qwen3_moe.Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=64),
         {"quant_method": "fp8", "weight_block_size": [32, 32]}, FineGrainedFP8Config(dequantize=True)),
    ],
    ids=["gpt_oss mxfp4", "qwen3_moe fp8"],
)  # fmt: skip
def test_experts_give_the_logits_of_transformers(
    tmp_path: Path, config: Any, quantization: dict[str, Any], decoding: Any
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.15)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    tensors = dict[str, Tensor]()
    for key, tensor in load_file(tmp_path / "model.safetensors").items():
        tensors |= encoded(key, tensor)
    assert len(tensors) > len(model.state_dict())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    change_config(tmp_path, quantization_config=quantization)

    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=decoding)
    frozen: Any = load(
        Model(name=str(tmp_path), dtype="float32"), build_quantizer(Quant(kind="dense")), torch.device("cpu")
    )
    with torch.no_grad():
        expected = plain.float().eval()(input_ids=IDS, use_cache=False).logits
        actual = frozen.model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert frozen.manifest.ignored == ()
