"""Settings of LoRA on experts: scaling, ranks, targets, starts, and several adapters on one base."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.adapted_models import IDS, build_adapter, identity_of, load_base, logits
from support.expert_models import randomize_updates

from qlora.adapters import peft_files
from qlora.adapters.attach import build_layers
from qlora.adapters.expert_targets import experts_per_token, resolve_expert_rank
from qlora.adapters.init import initialize
from qlora.adapters.inject import adapted_experts, inject
from qlora.adapters.lora import Lora
from qlora.adapters.patterns import by_pattern
from qlora.adapters.round_robin import RoundRobin
from qlora.adapters.rslora import RsLora
from qlora.adapters.switch import AdapterSwitch, disable_adapters
from qlora.errors import AdapterError
from qlora.model.original_weights import iter_weights

Zoo = Callable[[str], Path]
EXPERTS, INPUTS, OUTPUTS, RANK = 5, 12, 7, 3
CLOSE = {"rtol": 0, "atol": 1e-5}


# ---- settings


@pytest.mark.parametrize("kind", [Lora, RsLora])
def test_experts_have_the_adapters_scaling_unless_a_pattern_gives_a_rank(kind: type[Lora]) -> None:
    path = "model.layers.3.mlp.experts.gate_up_proj"
    adapter = kind(16, 8.0, 0.0, {}, {}, 2)
    assert adapter.for_experts(path).rank == 2
    assert adapter.for_experts(path).scaling == pytest.approx(adapter.scaling)
    by_rank = kind(16, 8.0, 0.0, {"experts.gate_up_proj": 4}, {}, 2).for_experts(path)
    assert (by_rank.rank, by_rank.alpha) == (4, 8.0)  # as a pattern of any other module
    by_alpha = kind(16, 8.0, 0.0, {}, {"gate_up_proj": 5.0}, 2).for_experts(path)
    assert (by_alpha.rank, by_alpha.alpha) == (2, 5.0)
    doubled = adapter.with_rank_times(2)
    assert doubled.for_experts(path).rank == 4
    assert doubled.for_experts(path).scaling == pytest.approx(adapter.scaling)
    assert by_pattern({"gate_up_proj": 1}, path, 0) == 1


def test_auto_divides_the_rank_by_the_experts_a_token_visits(expert_zoo: Zoo) -> None:
    model = load_base(expert_zoo("mixtral"), "dense").model
    assert experts_per_token(model.config) == 2
    for setting, rank, expected_rank in (("auto", 16, 8), ("auto", 1, 1), (3, 16, 3), (0, 16, 0)):
        assert resolve_expert_rank(setting, rank, model) == expected_rank


def test_an_expert_rank_without_effect_is_refused(zoo: Zoo) -> None:
    model = load_base(zoo("llama"), "dense").model
    assert resolve_expert_rank("auto", 16, model) == 0
    for setting in (0, 2):
        with pytest.raises(AdapterError, match=r"expert_rank: .* has no effect: LlamaForCausalLM has no experts"):
            resolve_expert_rank(setting, 16, model)


def test_a_config_without_the_number_of_visits_is_refused() -> None:
    with pytest.raises(AdapterError, match="does not say how many experts a token visits"):
        experts_per_token(object())


TARGETS = {
    "all": ("all-linear", 2, ["gate_up_proj", "down_proj"], 8),
    "a name": (["q_proj", "gate_up_proj"], 2, ["gate_up_proj"], 2),
    "the end of a path": (["experts.down_proj"], 2, ["down_proj"], 0),
    "an expression": (r".*layers\.1\..*experts.*", 1, ["gate_up_proj", "down_proj"], 0),
    "none of them": (["q_proj"], 2, [], 2),
}


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("name", TARGETS)
def test_targets_name_stacks(expert_zoo: Zoo, name: str) -> None:
    targets, layers, leaves, linear = TARGETS[name]
    base = load_base(expert_zoo("qwen3_moe"), "nf4")
    injection = inject(base.model, Lora(4, 8.0, 0.0, expert_rank=1), targets, 0)
    stacks = adapted_experts(base.model)
    assert [path.rpartition(".")[2] for path in stacks] == leaves * layers
    assert injection.expert_stacks == len(stacks) and injection.adapted_experts == 4 * len(stacks)
    assert (injection.expert_matrices, injection.linear_layers) == (16, 8)
    assert len(injection.paths) == linear + len(stacks)
    assert f"in {linear} of 8 linear layers and {4 * len(stacks)} of 16 expert matrices" in str(injection)
    assert str(injection).count("router frozen, its auxiliary loss is 0") == 1
    trainable = sum(p.numel() for p in base.model.parameters() if p.requires_grad)
    assert injection.trainable_parameters == trainable
    plain = load_base(expert_zoo("qwen3_moe"), "dense")
    assert injection.parameters == sum(parameter.numel() for parameter in plain.model.parameters())


def test_frozen_experts_are_left_out_and_naming_them_is_refused(expert_zoo: Zoo) -> None:
    base = load_base(expert_zoo("qwen3_moe"), "dense")
    with pytest.raises(AdapterError, match=r"'gate_up_proj' can't be adapted: adapter.expert_rank: 0 leaves"):
        inject(base.model, Lora(4, 8.0, 0.0), ["gate_up_proj"], 0)
    injection = inject(base.model, Lora(4, 8.0, 0.0), "all-linear", 0)
    assert not adapted_experts(base.model) and injection.adapted_experts == 0 and len(injection.paths) == 8


def test_dora_of_experts_is_refused(expert_zoo: Zoo) -> None:
    base = load_base(expert_zoo("qwen3_moe"), "dense")
    adapter = build_adapter("dora").__class__(4, 8.0, 0.0, expert_rank=1)
    with pytest.raises(AdapterError, match=r"dora can't adapt experts.*expert_rank: 0"):
        inject(base.model, adapter, "all-linear", 0)


# ---- initializations


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("kind", ["pissa", "loftq"])
def test_starts_from_weights_remove_the_quantization_error_of_experts(
    expert_zoo: Zoo, kind: str, tmp_path: Path
) -> None:
    base = load_base(expert_zoo("gpt_oss"), "nf4")
    adapter = Lora(8, 16.0, 0.0, expert_rank=8)
    inject(base.model, adapter, ["gate_up_proj", "down_proj"], 0)
    result = initialize(base.model, kind, lambda paths: iter_weights(expert_zoo("gpt_oss"), paths), 0)
    assert result is not None and result.error_after < 0.9 * result.error_before
    originals = dict(iter_weights(expert_zoo("gpt_oss"), {f"{path}.1" for path in adapted_experts(base.model)}))
    for path, layer in adapted_experts(base.model).items():
        original, stored = originals[f"{path}.1"], layer.base[1].weight(torch.float32)
        error = original - stored
        assert (error - layer.delta(1)).norm() < 0.95 * error.norm()
    expected_logits = logits(base.model.eval())
    peft_files.write(tmp_path, base.model, adapter, identity_of(base))
    fresh = load_base(expert_zoo("gpt_oss"), "nf4")
    layers, note = build_layers(fresh.model, peft_files.read(tmp_path), fresh.manifest.sha256)
    switch = AdapterSwitch(fresh.model)
    switch.add("read", layers)
    switch.activate("read")
    torch.testing.assert_close(logits(fresh.model.eval()), expected_logits, rtol=0, atol=1e-4)
    assert note is None


def test_gaussian_has_pefts_spread(expert_zoo: Zoo) -> None:
    base = load_base(expert_zoo("mixtral"), "dense")
    inject(base.model, Lora(8, 16.0, 0.0, expert_rank=4), ["gate_up_proj"], 0)
    initialize(base.model, "gaussian", lambda paths: [], 0)
    for layer in adapted_experts(base.model).values():
        assert float(layer.A.detach().std()) == pytest.approx(1 / 4, rel=0.1) and not layer.B.any()


# ---- several adapters on one base


class Switched:
    """A base of experts with two adapters in a switch, and the logits of each of them alone."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.base, self.alone = load_base(model, "dense"), {}
        self.switch = AdapterSwitch(self.base.model)
        for name, rank in (("a", 1), ("b", 3)):
            own = load_base(model, "dense")
            adapter = Lora(4, 8.0, 0.0, expert_rank=rank)
            inject(own.model, adapter, "all-linear", rank)
            randomize_updates(own.model)
            peft_files.write(folder / name, own.model, adapter, identity_of(own))
            self.alone[name] = logits(own.model.eval())
            layers, _ = build_layers(self.base.model, peft_files.read(folder / name), own.manifest.sha256)
            self.switch.add(name, layers)
        self.base.model.eval()


@pytest.fixture(scope="module")
def switched(expert_zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Switched:
    return Switched(expert_zoo("qwen3_moe"), tmp_path_factory.mktemp("switched"))


def test_switching_gives_each_adapter_alone(switched: Switched) -> None:
    before = logits(switched.base.model)
    for name in ("a", "b", "a"):
        switched.switch.activate(name)
        assert torch.equal(logits(switched.base.model), switched.alone[name])
        with disable_adapters(switched.base.model):
            assert torch.equal(logits(switched.base.model), before)
    switched.switch.activate(None)
    assert torch.equal(logits(switched.base.model), before) and not adapted_experts(switched.base.model)


def test_a_mix_is_the_weighted_sum_of_the_updates(switched: Switched) -> None:
    path = "model.layers.1.mlp.experts.gate_up_proj"
    deltas = {}
    for name in ("a", "b"):
        switched.switch.activate(name)
        deltas[name] = switched.base.model.get_submodule(path).delta(2)
    switched.switch.mix({"a": 0.5, "b": -2.0})
    mixed = switched.base.model.get_submodule(path).delta(2)
    torch.testing.assert_close(mixed, 0.5 * deltas["a"] - 2.0 * deltas["b"], **CLOSE)
    switched.switch.mix({"b": 1.0})
    torch.testing.assert_close(logits(switched.base.model), switched.alone["b"], rtol=0, atol=1e-4)
    switched.switch.activate(None)


def test_each_row_of_a_batch_has_its_own_adapter_of_experts(switched: Switched) -> None:
    before = logits(switched.base.model)
    with switched.switch.per_row(["b", None]) as rows:
        mixed = logits(switched.base.model)
        rows.select([0, 0])
        selected = logits(switched.base.model)
    torch.testing.assert_close(mixed[0], switched.alone["b"][0], **CLOSE)
    torch.testing.assert_close(mixed[1], before[1], **CLOSE)
    torch.testing.assert_close(selected, switched.alone["b"], **CLOSE)
    assert torch.equal(logits(switched.base.model), before)


def test_round_robin_keeps_each_adapter(expert_zoo: Zoo) -> None:
    base = load_base(expert_zoo("qwen3_moe"), "dense")
    before, turns, outputs = logits(base.model), RoundRobin(base.model), {}
    for name, rank in (("a", 1), ("b", 2)):
        turns.activate(None)
        inject(base.model, Lora(4, 8.0, 0.0, expert_rank=rank), "all-linear", rank)
        randomize_updates(base.model)
        turns.add(name)
        outputs[name] = logits(base.model)
    for name in ("a", "b"):
        turns.activate(name)
        assert torch.equal(logits(base.model, IDS), outputs[name])
    turns.remove("b")
    assert torch.equal(logits(base.model), before)
