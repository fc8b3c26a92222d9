"""PEFT as reference for adapters of experts: outputs and gradients, files read there and files read here."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapted_models import identity_of, load_base, load_plain
from support.adapted_models import logits as logits_of
from support.expert_models import EXPERTS, randomize_updates
from torch import Tensor
from torch.nn import functional as F

from qlora.adapters import peft_files
from qlora.adapters.attach import attach
from qlora.adapters.expert_keys import keys_of_stacks, stack_a, stack_b
from qlora.adapters.fit_to_base import fit_to_base
from qlora.adapters.inject import adapted, adapted_experts, inject
from qlora.adapters.lora import Lora
from qlora.adapters.rslora import RsLora
from qlora.errors import AdapterError
from qlora.model.load_base import Base

peft = pytest.importorskip("peft")

Zoo = Callable[[str], Path]
IDS = torch.randint(5, 250, (2, 30), generator=torch.Generator().manual_seed(0))
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
SETTINGS: dict[str, tuple[Lora, Any]] = {
    "one rank": (Lora(2, 6.0, 0.0, expert_rank=2), "all-linear"),
    "dropout": (Lora(4, 6.0, 0.1, expert_rank=2), "all-linear"),
    "rsLoRA": (RsLora(4, 6.0, 0.0, expert_rank=1), "all-linear"),
    "experts only": (Lora(4, 6.0, 0.0, expert_rank=3), STACKS),
    "one stack": (Lora(4, 6.0, 0.0, expert_rank=1), ["q_proj", "experts.down_proj"]),
    "one layer": (Lora(4, 6.0, 0.0, expert_rank=1), r"model\.layers\.1\..*"),
    "a rank of a pattern": (Lora(4, 6.0, 0.0, {"experts.down_proj": 3, "q_proj": 2}, {}, 1), "all-linear"),
    "an alpha of a pattern": (Lora(4, 6.0, 0.0, {}, {r".*layers\.1\.mlp.*": 3.0}, 1), "all-linear"),
    "patterns of one layer": (Lora(4, 6.0, 0.0, {r"layers\.1\.mlp\.experts\..*": 2}, {}, 1), "all-linear"),
    "frozen experts": (Lora(4, 6.0, 0.0, {"gate_proj": 2}), "all-linear"),
}
SHARED = {
    "mlp.shared_experts.up_proj.weight",
    "mlp.up_proj.weight",
}  # layers beside the experts, which PEFT would take for experts


def logits(model: Any) -> Tensor:
    return logits_of(model, IDS)


def write_trained(base: Base, adapter: Lora, targets: Any, folder: Path) -> None:
    inject(base.model, adapter, targets, 0)
    randomize_updates(base.model)
    base.model.eval()
    peft_files.write(folder, base.model, adapter, identity_of(base))


def read_in_peft(model: Path, folder: Path) -> Any:
    with warnings.catch_warnings():
        # PEFT 0.21 takes patterns of parameters for unused: it looks for modules only, yet applies them.
        warnings.filterwarnings("ignore", message=".*keys did not match any targeted module")
        return peft.PeftModel.from_pretrained(load_plain(model), folder, is_trainable=True).eval()


def backward(model: Any) -> Tensor:
    out = model(input_ids=IDS).logits
    F.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    return out.detach()


def own_gradients(model: Any) -> dict[str, Tensor]:
    """Gradients under PEFT's names."""
    stacks = adapted_experts(model)
    keys = keys_of_stacks(stacks)
    gradients = {}
    for path, layer in stacks.items():
        gradients[f"{keys[path]}.lora_A"] = stack_a(layer.A.grad)
        gradients[f"{keys[path]}.lora_B"] = stack_b(layer.B.grad)
    for path, layer in adapted(model).items():
        gradients |= {f"{path}.lora_A": layer.A.grad, f"{path}.lora_B": layer.B.grad}
    return gradients


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("family", EXPERTS)
def test_outputs_and_gradients_are_pefts(expert_zoo: Zoo, family: str, tmp_path: Path) -> None:
    base = load_base(expert_zoo(family), "dense")
    before = logits(base.model)
    write_trained(base, Lora(4, 6.0, 0.0, expert_rank=2), "all-linear", tmp_path)
    peft_model = read_in_peft(expert_zoo(family), tmp_path)
    outputs = [backward(model) for model in (base.model, peft_model)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-4)
    assert (outputs[0] - before).abs().max() > 0.1
    gradients = own_gradients(base.model)
    others = {
        name.removeprefix(peft_files.PREFIX).removesuffix(".default.weight"): parameter.grad
        for name, parameter in peft_model.named_parameters() if parameter.requires_grad
    }  # fmt: skip
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=0, atol=1e-5)
        assert gradient.abs().max() > 1e-4


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("name", SETTINGS)
def test_peft_reads_every_setting_from_our_folder(expert_zoo: Zoo, name: str, tmp_path: Path) -> None:
    base = load_base(expert_zoo("qwen2_moe"), "dense")
    adapter, targets = SETTINGS[name]
    write_trained(base, adapter, targets, tmp_path)
    expected = logits(base.model)
    torch.testing.assert_close(logits(read_in_peft(expert_zoo("qwen2_moe"), tmp_path)), expected, rtol=0, atol=1e-4)
    fresh = load_base(expert_zoo("qwen2_moe"), "dense")
    assert attach(fresh.model, peft_files.read(tmp_path), fresh.manifest.sha256) is None
    assert torch.equal(logits(fresh.model.eval()), expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_we_read_pefts_folder_bit_for_bit(expert_zoo: Zoo, family: str, tmp_path: Path) -> None:
    first = "up_proj" if family == "nemotron_h" else "gate_up_proj"
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=[f"experts.{first}", "experts.down_proj"],
        rank_pattern={f"experts.{first}": 2}, alpha_pattern={"experts.down_proj": 9}, init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*keys did not match any targeted module")
        peft_model = peft.get_peft_model(load_plain(expert_zoo(family)), config).eval()
    peft_model.save_pretrained(tmp_path)
    base = load_base(expert_zoo(family), "dense")
    before, notes = logits(base.model), []
    file = fit_to_base(peft_files.read(tmp_path), base.model, lambda paths: [], notes.append)
    attach(base.model, file, base.manifest.sha256)
    stored, read = load_file(tmp_path / peft_files.WEIGHTS), peft_files.tensors(base.model)
    assert stored.keys() == read.keys() and all(torch.equal(stored[key], read[key]) for key in stored)
    torch.testing.assert_close(logits(base.model), logits(peft_model), rtol=0, atol=1e-4)
    assert (before - logits(base.model)).abs().max() > 0.1 and notes == []
    again = tmp_path / "again"
    peft_files.write_file(again, file)
    rewritten = load_file(again / peft_files.WEIGHTS)
    assert stored.keys() == rewritten.keys() and all(torch.equal(stored[key], rewritten[key]) for key in stored)


def test_layers_beside_the_experts_stay_readable(expert_zoo: Zoo, tmp_path: Path) -> None:
    base = load_base(expert_zoo("glm4_moe"), "dense")
    write_trained(base, Lora(4, 6.0, 0.0), "all-linear", tmp_path)
    torch.testing.assert_close(
        logits(read_in_peft(expert_zoo("glm4_moe"), tmp_path)), logits(base.model), rtol=0, atol=1e-4
    )
    config = json.loads((tmp_path / peft_files.CONFIG).read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert set(config["target_parameters"]) >= SHARED
    # As target modules they are stacks of experts for PEFT, and the file's tensors match nothing there.
    config["target_modules"] += ["gate_proj", "up_proj", "down_proj"]
    del config["target_parameters"]
    (tmp_path / peft_files.CONFIG).write_text(json.dumps(config))
    other = read_in_peft(expert_zoo("glm4_moe"), tmp_path)
    assert (logits(other) - logits(base.model)).abs().max() > 0.01


def test_wrong_columns_of_b_show_in_the_logits(expert_zoo: Zoo, tmp_path: Path) -> None:
    base = load_base(expert_zoo("qwen3_moe"), "dense")
    write_trained(base, Lora(4, 6.0, 0.0, expert_rank=2), "all-linear", tmp_path)
    path = tmp_path / peft_files.WEIGHTS
    tensors = load_file(path)
    for key in [key for key in tensors if "experts" in key and "lora_B" in key]:
        b = tensors[key].view(len(tensors[key]), 2, 4)
        tensors[key] = b.transpose(1, 2).flatten(1).contiguous()  # the expert index slowest, as in A
    save_file(tensors, path, {"format": "pt"})
    planted = logits(read_in_peft(expert_zoo("qwen3_moe"), tmp_path))
    assert (planted - logits(base.model)).abs().max() > 0.1
    fresh = load_base(expert_zoo("qwen3_moe"), "dense")
    attach(fresh.model, peft_files.read(tmp_path), fresh.manifest.sha256)
    torch.testing.assert_close(logits(fresh.model), planted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("version", "swaps"), [("0.18.1", True), ("0.19.1", False), (None, False)])
def test_the_layout_before_0_19_1_is_recognized(
    expert_zoo: Zoo, version: str | None, swaps: bool, tmp_path: Path
) -> None:
    base = load_base(expert_zoo("qwen3_moe_square"), "dense")
    write_trained(base, Lora(4, 6.0, 0.0, expert_rank=2), STACKS, tmp_path)
    expected, path = logits(base.model), tmp_path / peft_files.WEIGHTS
    tensors, old = load_file(path), {}
    for key in [key for key in tensors if "lora_A" in key]:
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        experts = 4
        old_a = b.view(len(b), -1, experts).permute(2, 1, 0).flatten(0, 1)
        old_b = a.view(experts, -1, a.shape[1]).permute(2, 1, 0).flatten(1)
        old |= {key: old_a.contiguous(), key.replace("lora_A", "lora_B"): old_b.contiguous()}
    save_file(old, path, {"format": "pt"})
    config = json.loads((tmp_path / peft_files.CONFIG).read_text()) | {"peft_version": version}
    (tmp_path / peft_files.CONFIG).write_text(json.dumps(config))
    fresh, notes = load_base(expert_zoo("qwen3_moe_square"), "dense"), []
    file = fit_to_base(peft_files.read(tmp_path), fresh.model, lambda paths: [], notes.append)
    # The gate's matrices are not square: their shapes tell. Of square ones only the version does.
    attach(fresh.model, file, fresh.manifest.sha256)
    assert torch.allclose(logits(fresh.model), expected, atol=1e-5) is swaps
    assert any("before 0.19.1: read as such" in note for note in notes)
    assert any("names no peft_version" in note for note in notes) is (version is None)


PLANTED = {
    "another rank": (lambda c, t: c.update(rank_pattern={".*experts.*": 3}), "rank 3 of adapter_config.json"),
    "one stack is missing": (lambda c, t: [t.pop(k) for k in [*t] if "experts.lora" in k], "other updates than the 2"),
    "an unknown parameter": (lambda c, t: c.update(target_parameters=["experts.w1"]), "w1 is not known"),
    "an expert by itself": (
        lambda c, t: t.update(
            {k.replace("self_attn.q_proj", "mlp.experts.0.up_proj"): t.pop(k) for k in [*t] if "q_proj" in k}
        ),
        "experts.0.up_proj is an expert alone, here a part of a stack",
    ),
    "fewer experts": (
        lambda c, t: t.update({k: v[:6] if "lora_A" in k else v[:, :6] for k, v in t.items() if "experts" in k}),
        "updates of 3 experts, the base has 4",
    ),
    "dropout of PEFT's is no problem": (lambda c, t: c.update(lora_dropout=0.1), None),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_damaged_file_of_experts_is_refused(expert_zoo: Zoo, name: str, tmp_path: Path) -> None:
    base = load_base(expert_zoo("qwen3_moe"), "dense")
    write_trained(base, Lora(4, 6.0, 0.0, expert_rank=2), "all-linear", tmp_path)
    tensors = load_file(tmp_path / peft_files.WEIGHTS)
    config = json.loads((tmp_path / peft_files.CONFIG).read_text())
    plant, message = PLANTED[name]
    plant(config, tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / peft_files.WEIGHTS)
    (tmp_path / peft_files.CONFIG).write_text(json.dumps(config))
    fresh = load_base(expert_zoo("qwen3_moe"), "dense")
    if message is None:
        attach(fresh.model, peft_files.read(tmp_path), fresh.manifest.sha256)
        return
    with pytest.raises(AdapterError, match=message):
        attach(fresh.model, peft_files.read(tmp_path), fresh.manifest.sha256)
