"""Laws of every adapter kind in the table, on every kind of frozen base."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny_models import FAMILIES
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from qlora.adapters import ADAPTERS, peft_files
from qlora.adapters.dora import DoraLinear
from qlora.adapters.inject import Injection, adapted, count, inject, select
from qlora.adapters.switch import adapters_off
from qlora.errors import AdapterError, QloraError
from qlora.model import Model
from qlora.model.load_base import Base, load
from qlora.quant import QUANTIZERS

Zoo = Callable[..., Path]
CPU = torch.device("cpu")
IDS = torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(0))
BUILT = [kind for kind in ADAPTERS if kind != "full"]  # its own laws are in test_full.py: it has no low rank
KINDS = [(kind, quantizer) for kind in BUILT for quantizer in QUANTIZERS]
SCALING = {"lora": lambda rank, alpha: alpha / rank, "rslora": lambda rank, alpha: alpha / math.sqrt(rank)}


def base_of(folder: Path, quantizer: str = "nf4", dtype: str = "float32") -> Base:
    return load(Model(name=str(folder), dtype=dtype), QUANTIZERS[quantizer](), CPU)


def adapter_of(kind: str, rank: int = 4, alpha: float = 6.0, dropout: float = 0.0) -> Any:
    return ADAPTERS[kind](rank=rank, alpha=alpha, dropout=dropout)


def trained(base: Base, kind: str, targets: Any = "all-linear", seed: int = 0, **options: Any) -> Any:
    """Put an adapter on the base all of whose tensors are far from where they start."""
    adapter = adapter_of(kind, **options)
    inject(base.model, adapter, targets, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for layer in adapted(base.model).values():
            layer.B.copy_(torch.randn(layer.B.shape, generator=generator) * 0.1)
            if isinstance(layer, DoraLinear):
                layer.magnitude.mul_(1 + 0.2 * torch.randn(layer.magnitude.shape, generator=generator))
    base.model.eval()
    return adapter


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def frozen_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted((n.replace(".base.", "."), t) for n, t in model.state_dict().items()):
        if not name.endswith((".A", ".B", ".magnitude")):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def identity(base: Base) -> peft_files.Identity:
    return peft_files.Identity(base.manifest.name, base.manifest.revision, base.manifest.sha256)


# ---- as a function


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("kind", "quantizer"), KINDS)
def test_untrained_it_is_the_base(zoo: Zoo, kind: str, quantizer: str, training: bool) -> None:
    base = base_of(zoo("llama-tied-bias"), quantizer)
    before = logits(base.model)
    inject(base.model, adapter_of(kind, dropout=0.5), "all-linear", 0)
    after = logits(base.model.train(training))
    if kind == "dora":  # the bias is added after a product is scaled by 1, and dropout splits the product in two
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)  # float32 logits beyond 1 round more coarsely
    else:
        assert torch.equal(after, before)


@pytest.mark.parametrize(("kind", "quantizer"), KINDS)
def test_the_merged_matrix_gives_what_forward_gives(zoo: Zoo, kind: str, quantizer: str) -> None:
    base = base_of(zoo("llama-tied-bias"), quantizer)
    trained(base, kind)
    whole = logits(base.model)
    for path, layer in adapted(base.model).items():
        x = torch.randn(3, 5, layer.base.in_features, generator=torch.Generator().manual_seed(len(path)))
        merged = layer.merged_weight()
        assert merged.dtype == torch.float32 and torch.equal(merged, layer.base.weight(torch.float32) + layer.delta())
        with torch.no_grad():
            # float32 sums of 96 products, in another order
            torch.testing.assert_close(layer(x), F.linear(x, merged, layer.base.bias), rtol=1e-5, atol=1e-5)
        parent, _, leaf = path.rpartition(".")
        plain = QUANTIZERS["dense"]().quantize(merged, layer.base.bias)
        setattr(base.model.get_submodule(parent), leaf, plain)
    assert not adapted(base.model)
    torch.testing.assert_close(logits(base.model), whole, rtol=1e-4, atol=1e-4)  # two layers of such sums


@pytest.mark.parametrize("kind", SCALING)
@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 96), alpha=st.floats(0.1, 300.0))
def test_the_update_is_b_a_times_the_scale_of_its_kind(kind: str, rank: int, alpha: float) -> None:
    frozen = QUANTIZERS["dense"]().quantize(torch.zeros(6, 5))
    layer = adapter_of(kind, rank, alpha).wrap(frozen)
    layer.reset(torch.Generator().manual_seed(rank))
    with torch.no_grad():
        layer.B.normal_()
    expected = SCALING[kind](rank, alpha) * (layer.B.double() @ layer.A.double())
    torch.testing.assert_close(layer.delta().double(), expected, rtol=1e-4, atol=1e-4 * alpha)


@pytest.mark.parametrize("kind", BUILT)
def test_masters_are_float32_and_the_output_is_the_bases_dtype(zoo: Zoo, kind: str) -> None:
    base = base_of(zoo("llama"), "nf4", "bfloat16")
    trained(base, kind)
    layer = next(iter(adapted(base.model).values()))
    assert layer.A.dtype == layer.B.dtype == torch.float32
    assert layer(torch.randn(2, layer.base.in_features, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert logits(base.model).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", BUILT)
def test_dropout_is_for_training_only_and_only_on_the_adapters_input(zoo: Zoo, kind: str) -> None:
    base = base_of(zoo("llama"), "dense")
    trained(base, kind, dropout=0.5)
    layer = next(iter(adapted(base.model).values()))
    x = torch.randn(64, layer.base.in_features)
    with torch.no_grad():
        still = layer.eval()(x)
        assert torch.equal(still, layer(x))
        shaken = torch.stack([layer.train()(x) for _ in range(400)])
        update, mean = still - layer.base(x), shaken.mean(0) - layer.base(x)
    assert not torch.equal(shaken[0], shaken[1])
    # The mean of 400 draws is off by about 1/20 of one draw's spread, which is as large as the update itself.
    assert (mean - update).norm() < 0.15 * update.norm()


@pytest.mark.parametrize("kind", BUILT)
def test_the_start_depends_on_the_seed_alone(zoo: Zoo, kind: str) -> None:
    def start(quantizer: str, seed: int) -> list[Tensor]:
        base = base_of(zoo("llama"), quantizer)
        inject(base.model, adapter_of(kind), "all-linear", seed)
        return [layer.A.detach() for layer in adapted(base.model).values()]

    torch.manual_seed(123)
    first, other_base, other_seed = start("nf4", 7), start("dense", 7), start("nf4", 8)
    assert all(torch.equal(a, b) for a, b in zip(first, other_base, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other_seed, strict=True))
    assert len({tuple(a.flatten()[:4].tolist()) for a in first}) == len(first)
    for a in first:
        bound = 1 / math.sqrt(a.shape[1])  # kaiming_uniform(a=sqrt 5), PEFT's own start
        assert a.abs().max() <= bound and 0.5 * bound < a.std() < 0.65 * bound  # uniform: 0.577


# ---- as a learner


def learn(model: nn.Module, steps: int) -> list[set[str]]:
    """Take AdamW steps; returns the names that had a gradient other than zero, step by step."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=1e-2)
    moved = []
    for _ in range(steps):
        model.train()
        out = model(input_ids=IDS).logits
        F.cross_entropy(out[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten()).backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        moved.append({name for name, p in named.items() if p.grad is not None and bool(p.grad.any())})
        optimizer.step()
        optimizer.zero_grad()
    return moved


@pytest.mark.parametrize(("kind", "quantizer"), KINDS)
def test_only_the_adapter_learns_and_all_of_it(zoo: Zoo, kind: str, quantizer: str) -> None:
    base = base_of(zoo("llama-tied-bias"), quantizer)
    untouched, before = frozen_sha256(base.model), logits(base.model)
    inject(base.model, adapter_of(kind, dropout=0.1), "all-linear", 0)
    names = {name for name, p in base.model.named_parameters() if p.requires_grad}
    sides = ("A", "B", "magnitude") if kind == "dora" else ("A", "B")
    assert names == {f"{path}.{side}" for path in adapted(base.model) for side in sides}
    first, second, _ = learn(base.model, 3)
    assert first == {name for name in names if not name.endswith(".A")}  # B is zero, so A gets nothing yet
    assert second == names
    base.model.eval()
    assert not torch.allclose(logits(base.model), before)
    assert frozen_sha256(base.model) == untouched
    with adapters_off(base.model):
        assert torch.equal(logits(base.model), before)
    assert not torch.allclose(logits(base.model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_in_every_layer(zoo: Zoo, family: str) -> None:
    base = base_of(zoo(family), "nf4")
    inject(base.model, adapter_of("lora"), "all-linear", 0)
    _, second = learn(base.model, 2)
    assert second == {name for name, p in base.model.named_parameters() if p.requires_grad}


# ---- as a file


@pytest.mark.parametrize(("kind", "quantizer"), KINDS)
def test_written_read_and_attached_it_is_the_same_adapter(zoo: Zoo, kind: str, quantizer: str, tmp_path: Path) -> None:
    base = base_of(zoo("llama-tied-bias"), quantizer)
    adapter = trained(base, kind, dropout=0.25)
    peft_files.write(tmp_path, base.model, adapter, identity(base))
    fresh = base_of(zoo("llama-tied-bias"), quantizer)
    assert peft_files.attach(fresh.model, peft_files.read(tmp_path), fresh.manifest.sha256) is None
    ours, theirs = peft_files.tensors(base.model), peft_files.tensors(fresh.model)
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(logits(base.model), logits(fresh.model))
    with safe_open(tmp_path / peft_files.WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt", peft_files.FINGERPRINT: base.manifest.sha256}
    again = tmp_path / "again"
    peft_files.write(again, fresh.model, adapter, identity(fresh))
    assert (again / peft_files.CONFIG).read_bytes() == (tmp_path / peft_files.CONFIG).read_bytes()
    config = json.loads((tmp_path / peft_files.CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0.25)
    assert isinstance(config["lora_alpha"], int) and config["use_rslora"] is (kind == "rslora")
    assert config["use_dora"] is (kind == "dora")


def test_the_same_adapter_is_the_same_bytes() -> None:
    named = {"a": torch.ones(2), "b": torch.zeros(3)}
    assert len({peft_files.serialize(named, {peft_files.FINGERPRINT: "0" * 64}) for _ in range(30)}) == 1


def test_target_modules_name_what_was_adapted_and_nothing_else(zoo: Zoo, tmp_path: Path) -> None:
    for number, targets in enumerate(["all-linear", ["q_proj", "down_proj"], r".*\.0\.mlp\..*"]):
        base = base_of(zoo("llama"), "dense")
        peft_files.write(tmp_path / str(number), base.model, trained(base, "lora", targets), identity(base))
        named = json.loads((tmp_path / str(number) / peft_files.CONFIG).read_text())["target_modules"]
        model = AutoModelForCausalLM.from_pretrained(zoo("llama"))
        meant = {p for p, _ in model.named_modules() if any(p == name or p.endswith(f".{name}") for name in named)}
        assert meant == set(adapted(base.model))


def test_an_adapter_of_another_base_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    base, other = base_of(zoo("llama"), "nf4"), base_of(zoo("llama", seed=1), "nf4")
    peft_files.write(tmp_path, base.model, trained(base, "lora"), identity(base))
    before = logits(other.model)
    with pytest.raises(AdapterError, match="other weights"):
        peft_files.attach(other.model, peft_files.read(tmp_path), other.manifest.sha256)
    assert not adapted(other.model) and torch.equal(logits(other.model), before)
    peft_files.attach(other.model, peft_files.read(tmp_path), other.manifest.sha256, allow_other_base=True)
    assert adapted(other.model)


def test_an_adapter_that_does_not_fit_is_refused_whole(zoo: Zoo, tmp_path: Path) -> None:
    base = base_of(zoo("llama"), "dense")
    peft_files.write(tmp_path, base.model, trained(base, "lora"), identity(base))
    for family in ("gpt_neox", "phi3"):
        other = base_of(zoo(family), "dense")
        with pytest.raises(AdapterError, match="does not fit"):
            peft_files.attach(other.model, peft_files.read(tmp_path), base.manifest.sha256)
        assert not adapted(other.model)


def test_nothing_is_written_when_a_value_is_not_finite(zoo: Zoo, tmp_path: Path) -> None:
    base = base_of(zoo("llama"), "dense")
    adapter = trained(base, "lora")
    with torch.no_grad():
        list(adapted(base.model).values())[-1].B[0, 0] = math.nan
    with pytest.raises(QloraError, match="not finite") as caught:
        peft_files.write(tmp_path / "run", base.model, adapter, identity(base))
    assert caught.value.exit_code == 1
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def _changed(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / peft_files.WEIGHTS)
        change(tensors)
        save_file(tensors, folder / peft_files.WEIGHTS, metadata={"format": "pt"})

    return apply


def _configured(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / peft_files.CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


Q = "base_model.model.model.layers.0.self_attn.q_proj"
BROKEN: dict[str, Callable[[Path], Any]] = {
    "no weights": lambda folder: (folder / peft_files.WEIGHTS).unlink(),
    "no config": lambda folder: (folder / peft_files.CONFIG).unlink(),
    "weights cut": lambda folder: (folder / peft_files.WEIGHTS).write_bytes(
        (folder / peft_files.WEIGHTS).read_bytes()[:-9]
    ),
    "config cut": lambda folder: (folder / peft_files.CONFIG).write_text('{"peft_type": "LO'),
    "config a list": lambda folder: (folder / peft_files.CONFIG).write_text("[]"),
    "another method": _configured(peft_type="IA3"),
    "alpha zero": _configured(lora_alpha=0),
    "alpha a text": _configured(lora_alpha="16"),
    "alpha infinite": _configured(lora_alpha=math.inf),
    "dropout a text": _configured(lora_dropout="much"),
    "alpha pattern a list": _configured(alpha_pattern=["q_proj"]),
    "alpha pattern of texts": _configured(alpha_pattern={"q_proj": "8"}),
    "DoRA": _configured(use_dora=True),
    "a whole module that is not there": _configured(modules_to_save=["lm_head"]),
    "whole modules no list": _configured(modules_to_save="lm_head"),
    "rows that are not there": _configured(trainable_token_indices=[3]),
    "ranks of texts": _configured(rank_pattern={"q_proj": "8"}),
    "layers used twice": _configured(layer_replication=[[0, 2], [0, 2]]),
    "a switch by tokens": _configured(alora_invocation_tokens=[5, 6]),
    "A without B": _changed(lambda t: t.pop(f"{Q}.lora_B.weight")),
    "a strange tensor": _changed(lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(3, 3)})),
    "a tensor of another shape": _changed(lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 63)})),
    "A of another rank than B": _changed(lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(5, 64)})),
    "A with no rank": _changed(
        lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(0, 64), f"{Q}.lora_B.weight": torch.zeros(64, 0)})
    ),
    "not a number": _changed(lambda t: t.update({f"{Q}.lora_A.weight": torch.full((4, 64), math.nan)})),
    "codes in place of numbers": _changed(
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 64, dtype=torch.int8)})
    ),
    "a pair is missing": _changed(lambda t: (t.pop(f"{Q}.lora_A.weight"), t.pop(f"{Q}.lora_B.weight"))),
}


@pytest.fixture(scope="module")
def good(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter folder's two files, as text and bytes."""
    folder = tmp_path_factory.mktemp("adapter")
    base = base_of(zoo("llama"), "dense")
    peft_files.write(folder, base.model, trained(base, "lora"), identity(base))
    return {"folder": folder, "model": zoo("llama")}


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_adapter_is_refused_and_the_model_left_alone(good: dict[str, Path], case: str, tmp_path: Path) -> None:
    folder = copy_of(good["folder"], tmp_path / "adapter")
    BROKEN[case](folder)
    base = base_of(good["model"], "dense")
    with pytest.raises(AdapterError) as caught:
        peft_files.attach(base.model, peft_files.read(folder), base.manifest.sha256)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert not adapted(base.model)


@settings(max_examples=150, deadline=None)
@given(
    key=st.sampled_from(
        ["peft_type", "r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "target_modules"]
    ),
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    ),
)
def test_any_config_is_read_or_refused_but_never_crashes(good: dict[str, Path], key: str, value: Any) -> None:
    folder = good["folder"].parent / "fuzzed"
    copy_of(good["folder"], folder)
    _configured(**{key: value})(folder)
    try:
        file = peft_files.read(folder)
        for path, (a, _) in file.pairs.items():
            assert math.isfinite(peft_files.settings(file, path, a.shape[0]).scaling)
    except AdapterError as error:
        assert str(folder) in str(error)


# ---- targets and counts

LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = [
    ("all-linear", 14),
    (["q_proj", "v_proj"], 4),
    (["self_attn.q_proj"], 2),
    (["model.layers.1.mlp.up_proj"], 1),
    (["q_proj", "model.layers.0.self_attn.q_proj"], 2),
    (r".*\.layers\.0\..*", 7),
    (r".*(q|k)_proj", 4),
    (r"model\.layers\.[01]\.mlp\.down_proj", 2),
]


@pytest.mark.parametrize(("targets", "layers"), TARGETS, ids=[str(targets) for targets, _ in TARGETS])
def test_targets_mean_what_they_say(zoo: Zoo, targets: Any, layers: int) -> None:
    base = base_of(zoo("llama"), "dense")
    found = inject(base.model, adapter_of("lora"), targets, 0)
    assert len(found.paths) == layers == len(adapted(base.model)) and found.linear_layers == 14
    assert list(found.paths) == [path for path in base.manifest.quantized if path in found.paths]


@pytest.mark.parametrize(
    ("targets", "named", "near"),
    [
        (["q_prj"], "q_prj", "q_proj"),
        (["q_proj", "value_proj"], "value_proj", "v_proj"),
        (["proj"], "proj", "q_proj"),
        (["lm_head"], "lm_head", "q_proj"),
        (["embed_tokens"], "embed_tokens", "q_proj"),
        ("q_proj", "q_proj", "q_proj"),
        (r".*layers.7.*", ".*layers.7.*", "model.layers.0"),
        ("", "", "q_proj"),
        (r"(", "(", "regular expression"),
        ([], "", "q_proj"),
    ],
    ids=str,
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names(
    zoo: Zoo, targets: Any, named: str, near: str
) -> None:
    base = base_of(zoo("llama"), "dense")
    before = logits(base.model)
    with pytest.raises(AdapterError, match=r"adapter\.targets") as caught:
        inject(base.model, adapter_of("lora"), targets, 0)
    assert named in str(caught.value) and near in str(caught.value)
    assert not adapted(base.model) and torch.equal(logits(base.model), before)


@settings(max_examples=100, deadline=None)
@given(st.text("qkvo_proj.upgate()[]*+?\\|^$0123", max_size=14))
def test_any_pattern_selects_what_a_full_match_selects_or_is_refused(pattern: str) -> None:
    import re

    paths = [f"model.layers.{n}.{part}.{leaf}" for n in (0, 1) for part in ("self_attn",) for leaf in LEAVES[:4]]
    try:
        expected = [path for path in paths if re.fullmatch(pattern, path)]
    except re.error:
        expected = []
    try:
        assert select(paths, pattern) == expected != []
    except AdapterError:
        assert not expected


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_a_brute_force_count(zoo: Zoo, family: str, quantizer: str) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(zoo(family))
    linear = {p: m for p, m in theirs.named_modules() if isinstance(m, nn.Linear) and "layers" in p}
    base = base_of(zoo(family), quantizer)
    found: Injection = inject(base.model, adapter_of("lora", rank=3), "all-linear", 0)
    assert found.parameters == sum(p.numel() for p in theirs.parameters())
    assert found.trainable_parameters == sum(3 * (m.in_features + m.out_features) for m in linear.values())
    assert set(found.paths) == set(linear) and found.linear_layers == len(linear)
    share = 100 * found.trainable_parameters / found.parameters
    assert f"{found.trainable_parameters:,} trainable" in str(found) and f"{share:.2f} %" in str(found)
    assert count(base.model) == found
