"""`adapter.targets`: which layers a target matches, and the counts of parameters."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapted_models import build_adapter, load_base, load_plain, logits
from support.tiny_models import FAMILIES
from torch import nn

from qlora.adapters.inject import adapted, count, inject
from qlora.adapters.target_modules import select
from qlora.errors import AdapterError
from qlora.quant import QUANTIZERS

Zoo = Callable[..., Path]
LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj"]
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
def test_targets_select_the_layers_that_they_name(zoo: Zoo, targets: Any, layers: int) -> None:
    base = load_base(zoo("llama"), "dense")
    injection = inject(base.model, build_adapter("lora"), targets, 0)
    assert len(injection.paths) == layers == len(adapted(base.model)) and injection.linear_layers == 14
    assert list(injection.paths) == [path for path in base.manifest.quantized if path in injection.paths]


@pytest.mark.parametrize(
    ("targets", "refused", "suggested"),
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
    zoo: Zoo, targets: Any, refused: str, suggested: str
) -> None:
    base = load_base(zoo("llama"), "dense")
    before = logits(base.model)
    with pytest.raises(AdapterError, match=r"adapter\.targets") as caught:
        inject(base.model, build_adapter("lora"), targets, 0)
    assert refused in str(caught.value) and suggested in str(caught.value)
    assert not adapted(base.model) and torch.equal(logits(base.model), before)


@settings(max_examples=100, deadline=None)
@given(st.text("qkvo_proj.upgate()[]*+?\\|^$0123", max_size=14))
def test_any_pattern_selects_what_a_full_match_selects_or_is_refused(pattern: str) -> None:
    paths = [f"model.layers.{layer}.self_attn.{leaf}" for layer in (0, 1) for leaf in LEAVES]
    try:
        expected = [path for path in paths if re.fullmatch(pattern, path)]
    except re.error:
        expected = []
    try:
        assert select(paths, pattern) == expected != []
    except AdapterError:
        assert not expected


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_a_brute_force_count(zoo: Zoo, family: str, quantizer: str) -> None:
    plain = load_plain(zoo(family))
    linear = {p: m for p, m in plain.named_modules() if isinstance(m, nn.Linear) and "layers" in p}
    base = load_base(zoo(family), quantizer)
    injection = inject(base.model, build_adapter("lora", rank=3), "all-linear", 0)
    assert injection.parameters == sum(p.numel() for p in plain.parameters())
    assert injection.trainable_parameters == sum(3 * (m.in_features + m.out_features) for m in linear.values())
    assert set(injection.paths) == set(linear) and injection.linear_layers == len(linear)
    share = 100 * injection.trainable_parameters / injection.parameters
    assert f"{injection.trainable_parameters:,} trainable" in str(injection) and f"{share:.2f} %" in str(injection)
    assert count(base.model) == injection
