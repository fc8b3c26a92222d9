"""PEFT as reference: it reads our adapters, we read its adapters, and DoRA has its output and gradients."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapted_models import (
    build_adapter,
    identity_of,
    load_base,
    load_plain,
    randomize_adapter,
)
from support.adapted_models import logits as logits_of
from torch import Tensor
from torch.nn import functional as F

from qlora.adapters import peft_files
from qlora.adapters.attach import attach
from qlora.adapters.dora import DoraLinear
from qlora.adapters.inject import adapted, inject

peft = pytest.importorskip("peft")

Zoo = Callable[..., Path]
IDS = torch.randint(5, 250, (2, 30), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> Tensor:
    return logits_of(model, IDS)


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("targets", ["all-linear", r".*\.1\..*"], ids=["all", "one layer"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("family", ["llama-tied-bias", "gemma2", "qwen3", "phi3", "gpt_neox"])
def test_peft_reads_our_folder_without_a_warning(
    zoo: Zoo, family: str, kind: str, targets: str, tmp_path: Path
) -> None:
    base = load_base(zoo(family), "dense")
    adapter = build_adapter(kind, 3, 5.0, 0.1)
    inject(base.model, adapter, targets, 0)
    randomize_adapter(base.model)
    peft_files.write(tmp_path, base.model, adapter, identity_of(base))
    before = logits(load_plain(zoo(family)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for category in (DeprecationWarning, FutureWarning):  # PEFT's own about transformers, not about our folder
            warnings.simplefilter("ignore", category)
        peft_model = peft.PeftModel.from_pretrained(load_plain(zoo(family)), tmp_path).eval()
    expected = logits(base.model.eval())
    torch.testing.assert_close(logits(peft_model), expected, rtol=0, atol=1e-4)  # float32: another order of products
    assert (before - expected).abs().max() > 0.1


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "DoRA and rsLoRA by leaf": {"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 9}},
    "rsLoRA": {"use_rslora": True},
    "by leaf": {"rank_pattern": {"q_proj": 2, "down_proj": 8}, "alpha_pattern": {"q_proj": 32, "up_proj": 3}},
    "by path": {"rank_pattern": {"model.layers.0.mlp.up_proj": 7}, "alpha_pattern": {"layers.1.mlp.up_proj": 1}},
    "rsLoRA by leaf": {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"v_proj": 2}},
    "first of two matches": {"alpha_pattern": {"mlp.up_proj": 1, "up_proj": 64}},
    "by regular expression": {
        "rank_pattern": {r"layers\.\d+\.self_attn\..*": 2},
        "alpha_pattern": {r".*\.mlp\..*": 24},
    },
}


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("name", SETTINGS)
def test_we_read_pefts_folder(zoo: Zoo, name: str, tmp_path: Path) -> None:
    leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=leaves, init_lora_weights=False, task_type="CAUSAL_LM", **SETTINGS[name]
    )
    torch.manual_seed(0)
    peft_model = peft.get_peft_model(load_plain(zoo("llama")), config).eval()
    with torch.no_grad():
        for parameter_name, parameter in peft_model.named_parameters():
            if "lora_" in parameter_name:
                parameter.mul_(2.0)
    peft_model.save_pretrained(tmp_path)
    base = load_base(zoo("llama"), "dense")
    before = logits(base.model)
    note = attach(base.model, peft_files.read(tmp_path), base.manifest.sha256)
    assert note is not None and "can't be checked" in note
    torch.testing.assert_close(logits(base.model), logits(peft_model), rtol=0, atol=1e-4)
    assert (before - logits(base.model)).abs().max() > 0.1


def test_a_config_without_alpha_has_pefts_default(zoo: Zoo, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    peft.get_peft_model(load_plain(zoo("llama")), config).save_pretrained(tmp_path)
    path = tmp_path / peft_files.CONFIG
    without_alpha = {key: value for key, value in json.loads(path.read_text()).items() if key != "lora_alpha"}
    path.write_text(json.dumps(without_alpha))
    peft_model = peft.PeftModel.from_pretrained(load_plain(zoo("llama")), tmp_path).eval()
    base = load_base(zoo("llama"), "dense")
    attach(base.model, peft_files.read(tmp_path), base.manifest.sha256)
    torch.testing.assert_close(logits(base.model), logits(peft_model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_dora_has_pefts_output_and_gradients_with_dropout(zoo: Zoo, training: bool, tmp_path: Path) -> None:
    base = load_base(zoo("llama"), "dense")
    adapter = build_adapter("dora", 3, 5.0, 0.4)
    inject(base.model, adapter, "all-linear", 0)
    randomize_adapter(base.model)
    peft_files.write(tmp_path, base.model, adapter, identity_of(base))
    peft_model = peft.PeftModel.from_pretrained(load_plain(zoo("llama")), tmp_path, is_trainable=True)
    outputs = []
    for model in (base.model, peft_model):
        torch.manual_seed(3)  # both draw one mask per layer, in the order of the layers
        out = model.train(training)(input_ids=IDS).logits
        F.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        outputs.append(out.detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-4)
    grads = {
        name.removeprefix(peft_files.PREFIX).replace(".default", "").removesuffix(".weight"): parameter.grad
        for name, parameter in peft_model.named_parameters() if parameter.requires_grad
    }  # fmt: skip
    for path, layer in adapted(base.model).items():
        assert isinstance(layer, DoraLinear)
        for name, value in (("lora_A", layer.A), ("lora_B", layer.B), ("lora_magnitude_vector", layer.magnitude)):
            torch.testing.assert_close(value.grad, grads[f"{path}.{name}"], rtol=1e-4, atol=1e-6)
