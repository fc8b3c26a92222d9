"""Laws of every adapter kind in the table, on every kind of frozen base."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from support.adapted_models import IDS, build_adapter, freeze, identity_of, inject_trained, load_base, logits
from support.tiny_models import FAMILIES
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.adapters import ADAPTERS, peft_files
from qlora.adapters.attach import attach
from qlora.adapters.inject import adapted, inject
from qlora.adapters.switch import disable_adapters
from qlora.quant import QUANTIZERS

Zoo = Callable[..., Path]
LOW_RANK = [kind for kind in ADAPTERS if kind != "full"]  # the laws of `full` are in test_full.py
KINDS = [(kind, quantizer) for kind in LOW_RANK for quantizer in QUANTIZERS]
SCALING = {"lora": lambda rank, alpha: alpha / rank, "rslora": lambda rank, alpha: alpha / math.sqrt(rank)}


def frozen_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted((n.replace(".base.", "."), t) for n, t in model.state_dict().items()):
        if not name.endswith((".A", ".B", ".magnitude")):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- forward


@pytest.mark.sample(of=4, every=("kind", "quantizer"))
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("kind", "quantizer"), KINDS)
def test_an_untrained_adapter_gives_the_base(zoo: Zoo, kind: str, quantizer: str, training: bool) -> None:
    base = load_base(zoo("llama-tied-bias"), quantizer)
    before = logits(base.model)
    inject(base.model, build_adapter(kind, dropout=0.5), "all-linear", 0)
    after = logits(base.model.train(training))
    if kind == "dora":  # the bias is added after a product is scaled by 1, and dropout splits the product in two
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)  # float32 logits beyond 1 round more coarsely
    else:
        assert torch.equal(after, before)


@pytest.mark.sample(of=3, every=("kind", "quantizer"))
@pytest.mark.parametrize(("kind", "quantizer"), KINDS)
def test_the_merged_matrix_gives_what_forward_gives(zoo: Zoo, kind: str, quantizer: str) -> None:
    base = load_base(zoo("llama-tied-bias"), quantizer)
    inject_trained(base, kind)
    adapted_logits = logits(base.model)
    for path, layer in adapted(base.model).items():
        x = torch.randn(3, 5, layer.base.in_features, generator=torch.Generator().manual_seed(len(path)))
        merged = layer.merged_weight()
        assert merged.dtype == torch.float32 and torch.equal(merged, layer.base.weight(torch.float32) + layer.delta())
        with torch.no_grad():
            # float32 sums of 96 products, in another order
            torch.testing.assert_close(layer(x), F.linear(x, merged, layer.base.bias), rtol=1e-5, atol=1e-5)
        parent, _, leaf = path.rpartition(".")
        dense = freeze(merged, layer.base.bias)
        setattr(base.model.get_submodule(parent), leaf, dense)
    assert not adapted(base.model)
    torch.testing.assert_close(logits(base.model), adapted_logits, rtol=1e-4, atol=1e-4)  # two layers of such sums


@pytest.mark.parametrize("kind", SCALING)
@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 96), alpha=st.floats(0.1, 300.0))
def test_the_update_is_b_a_times_the_scaling_of_its_kind(kind: str, rank: int, alpha: float) -> None:
    layer = build_adapter(kind, rank, alpha).wrap(freeze(torch.zeros(6, 5)))
    layer.reset(torch.Generator().manual_seed(rank))
    with torch.no_grad():
        layer.B.normal_()
    expected = SCALING[kind](rank, alpha) * (layer.B.double() @ layer.A.double())
    torch.testing.assert_close(layer.delta().double(), expected, rtol=1e-4, atol=1e-4 * alpha)


@pytest.mark.parametrize("kind", LOW_RANK)
def test_adapter_weights_are_float32_and_the_output_has_the_bases_dtype(zoo: Zoo, kind: str) -> None:
    base = load_base(zoo("llama"), "nf4", "bfloat16")
    inject_trained(base, kind)
    layer = next(iter(adapted(base.model).values()))
    assert layer.A.dtype == layer.B.dtype == torch.float32
    assert layer(torch.randn(2, layer.base.in_features, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert logits(base.model).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", LOW_RANK)
def test_dropout_is_in_training_only_and_on_the_adapters_input_only(zoo: Zoo, kind: str) -> None:
    base = load_base(zoo("llama"), "dense")
    inject_trained(base, kind, dropout=0.5)
    layer = next(iter(adapted(base.model).values()))
    x = torch.randn(64, layer.base.in_features)
    with torch.no_grad():
        without = layer.eval()(x)
        assert torch.equal(without, layer(x))
        draws = torch.stack([layer.train()(x) for _ in range(400)])
        update, mean = without - layer.base(x), draws.mean(0) - layer.base(x)
    assert not torch.equal(draws[0], draws[1])
    # The mean of 400 draws is off by about 1/20 of one draw's spread, which is as large as the update itself.
    assert (mean - update).norm() < 0.15 * update.norm()


@pytest.mark.parametrize("kind", LOW_RANK)
def test_the_initialization_depends_on_the_seed_alone(zoo: Zoo, kind: str) -> None:
    def initial_a(quantizer: str, seed: int) -> list[Tensor]:
        base = load_base(zoo("llama"), quantizer)
        inject(base.model, build_adapter(kind), "all-linear", seed)
        return [layer.A.detach() for layer in adapted(base.model).values()]

    torch.manual_seed(123)
    first, other_base, other_seed = initial_a("nf4", 7), initial_a("dense", 7), initial_a("nf4", 8)
    assert all(torch.equal(a, b) for a, b in zip(first, other_base, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other_seed, strict=True))
    assert len({tuple(a.flatten()[:4].tolist()) for a in first}) == len(first)
    for a in first:
        bound = 1 / math.sqrt(a.shape[1])  # kaiming_uniform(a=sqrt 5), as in PEFT
        assert a.abs().max() <= bound and 0.5 * bound < a.std() < 0.65 * bound  # uniform: 0.577


# ---- training


def train_steps(model: nn.Module, steps: int) -> list[set[str]]:
    """Take AdamW steps; returns the names of parameters with a non-zero gradient, step by step."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=1e-2)
    names = []
    for _ in range(steps):
        model.train()
        out = model(input_ids=IDS).logits
        F.cross_entropy(out[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten()).backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        names.append({name for name, p in named.items() if p.grad is not None and bool(p.grad.any())})
        optimizer.step()
        optimizer.zero_grad()
    return names


@pytest.mark.sample(of=3, every=("kind", "quantizer"))
@pytest.mark.parametrize(("kind", "quantizer"), KINDS)
def test_only_the_adapter_learns_and_all_of_it(zoo: Zoo, kind: str, quantizer: str) -> None:
    base = load_base(zoo("llama-tied-bias"), quantizer)
    digest, before = frozen_sha256(base.model), logits(base.model)
    inject(base.model, build_adapter(kind, dropout=0.1), "all-linear", 0)
    names = {name for name, p in base.model.named_parameters() if p.requires_grad}
    sides = ("A", "B", "magnitude") if kind == "dora" else ("A", "B")
    assert names == {f"{path}.{side}" for path in adapted(base.model) for side in sides}
    first, second, _ = train_steps(base.model, 3)
    assert first == {name for name in names if not name.endswith(".A")}  # B is zero, so A has no gradient yet
    assert second == names
    base.model.eval()
    assert not torch.allclose(logits(base.model), before)
    assert frozen_sha256(base.model) == digest
    with disable_adapters(base.model):
        assert torch.equal(logits(base.model), before)
    assert not torch.allclose(logits(base.model), before)


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_in_every_layer(zoo: Zoo, family: str) -> None:
    base = load_base(zoo(family), "nf4")
    inject(base.model, build_adapter("lora"), "all-linear", 0)
    _, second = train_steps(base.model, 2)
    assert second == {name for name, p in base.model.named_parameters() if p.requires_grad}


# ---- files


@pytest.mark.sample(of=3, every=("kind", "quantizer"))
@pytest.mark.parametrize(("kind", "quantizer"), KINDS)
def test_an_adapter_is_the_same_after_writing_and_reading(zoo: Zoo, kind: str, quantizer: str, tmp_path: Path) -> None:
    base = load_base(zoo("llama-tied-bias"), quantizer)
    adapter = inject_trained(base, kind, dropout=0.25)
    peft_files.write(tmp_path, base.model, adapter, identity_of(base))
    fresh = load_base(zoo("llama-tied-bias"), quantizer)
    assert attach(fresh.model, peft_files.read(tmp_path), fresh.manifest.sha256) is None
    written, read = peft_files.tensors(base.model), peft_files.tensors(fresh.model)
    assert list(written) == list(read) and all(torch.equal(written[key], read[key]) for key in written)
    assert torch.equal(logits(base.model), logits(fresh.model))
    with safe_open(tmp_path / peft_files.WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt", peft_files.FINGERPRINT: base.manifest.sha256}
    again = tmp_path / "again"
    peft_files.write(again, fresh.model, adapter, identity_of(fresh))
    assert (again / peft_files.CONFIG).read_bytes() == (tmp_path / peft_files.CONFIG).read_bytes()
    config = json.loads((tmp_path / peft_files.CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0.25)
    assert isinstance(config["lora_alpha"], int) and config["use_rslora"] is (kind == "rslora")
    assert config["use_dora"] is (kind == "dora")
