"""Adapters of PEFT in every configuration that can be read compute what PEFT computes: a table, and random ones."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.adapted_models import load_plain, logits
from support.peft_adapters import change_tensors, read_dense, save_peft_adapter

peft = pytest.importorskip("peft")

Zoo = Callable[..., Path]
UNTIED, TIED = "llama", "llama-tied-bias"
ENDS = ["embed_tokens", "lm_head"]
IDS = torch.randint(5, 290, (2, 24), generator=torch.Generator().manual_seed(0))
EXACT, SVD = 1e-5, 1e-4  # PEFT's float32 SVD differs by 2e-6 from the exact one, ours by 3e-8
PATTERNS: dict[str, Any] = {"use_rslora": True, "rank_pattern": {"down_proj": 7}, "alpha_pattern": {"q_proj": 3}}
CONFIGS: dict[str, dict[str, Any]] = {
    "more rows": {"rows": 390},
    "fewer rows": {"rows": 300},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on both": {"target_modules": ["q_proj", *ENDS], "use_rslora": True, "alpha_pattern": {"lm_head": 3}},
    "LoRA on both with more rows": {"target_modules": ["q_proj", *ENDS], "rows": 390},
    "LoRA on the embedding alone": {"target_modules": ["embed_tokens"]},
    "DoRA on both": {"target_modules": ["q_proj", *ENDS], "use_dora": True},
    "trained rows": {"trainable_token_indices": [5, 9]},
    "trained rows of new tokens": {"trainable_token_indices": [285, 386], "rows": 390},
    "trained rows by name": {"trainable_token_indices": {"embed_tokens": [285, 386]}, "rows": 390},
    "modules to save": {"modules_to_save": ENDS},
    "modules to save with more rows": {"modules_to_save": ENDS, "rows": 390},
    "embedding to save with more rows": {"modules_to_save": ["embed_tokens"], "rows": 390},
    "a module to save that is not there": {"modules_to_save": ["embed_tokens", "embed_out"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()},
    "mica": {"init_lora_weights": "mica"},
    "no start": {"init_lora_weights": False},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa with DoRA": {"init_lora_weights": "pissa", "use_dora": True},
    "pissa with patterns": {"init_lora_weights": "pissa", **PATTERNS},
    "olora": {"init_lora_weights": "olora"},
    "olora with patterns": {"init_lora_weights": "olora", **PATTERNS},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "without some": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "lm_head"]},
    "regular expression": {"target_modules": r".*\.0\..*_proj"},
    "velora": {"velora_config": {"num_groups": 4}},
    "fan_in_fan_out": {"fan_in_fan_out": True},
}  # fmt: skip


def refuse_warnings() -> None:
    warnings.simplefilter("ignore")  # PEFT's about sizes and starts


TOUCHES_ENDS = ("rows", "trainable_token_indices", "modules_to_save")
CASES = [
    (name, family)
    for name, config in CONFIGS.items()
    for family in (UNTIED, TIED)
    if family == UNTIED or {*ENDS} & {*config.get("target_modules", ())} or {*TOUCHES_ENDS} & config.keys()
]


@pytest.mark.sample(of=6)
@pytest.mark.parametrize(("name", "family"), CASES)
def test_every_configuration_computes_what_peft_computes(zoo: Zoo, name: str, family: str, tmp_path: Path) -> None:
    refuse_warnings()
    trained = save_peft_adapter(zoo(family), tmp_path, **CONFIGS[name])
    base = read_dense(zoo(family), tmp_path)
    expected, untrained = logits(trained, IDS), logits(load_plain(zoo(family)), IDS)
    tolerance = SVD if "pissa" in name else EXACT
    torch.testing.assert_close(logits(base.model, IDS), expected, rtol=0, atol=tolerance)
    assert (expected[..., :300] - untrained[..., :300]).abs().max() > 0.1


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_changed_base_is_what_peft_loads_again(zoo: Zoo, start: str, tmp_path: Path) -> None:
    refuse_warnings()
    save_peft_adapter(zoo(UNTIED), tmp_path, init_lora_weights=start)
    again = peft.PeftModel.from_pretrained(load_plain(zoo(UNTIED)), tmp_path).eval()
    lines: list[str] = []
    base = read_dense(zoo(UNTIED), tmp_path, lines.append)
    torch.testing.assert_close(logits(base.model, IDS), logits(again, IDS), rtol=0, atol=SVD)
    assert f"its start ({start}) changed the base" in lines[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_tensors_are_read(zoo: Zoo, dtype: torch.dtype, tmp_path: Path) -> None:
    save_peft_adapter(zoo(UNTIED), tmp_path, use_dora=True)
    change_tensors(tmp_path, lambda tensors: {key: value.to(dtype) for key, value in tensors.items()})
    trained = peft.PeftModel.from_pretrained(load_plain(zoo(UNTIED)), tmp_path).eval()
    base = read_dense(zoo(UNTIED), tmp_path)
    torch.testing.assert_close(logits(base.model, IDS), logits(trained, IDS), rtol=0, atol=EXACT)


LEAVES = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
CONFIGURATIONS = st.fixed_dictionaries(
    {
        "r": st.integers(2, 6),
        "lora_alpha": st.integers(1, 9),
        "target_modules": st.lists(st.sampled_from([*LEAVES, *ENDS]), min_size=1, unique=True),
        "use_rslora": st.booleans(),
        "use_dora": st.booleans(),
        "rank_pattern": st.dictionaries(st.sampled_from(LEAVES), st.integers(1, 6)),
        "alpha_pattern": st.dictionaries(st.sampled_from([*LEAVES, r".*\.1\..*"]), st.integers(1, 9)),
        "modules_to_save": st.sampled_from([None, ["norm"], ["input_layernorm"]]),
        "init_lora_weights": st.sampled_from([True, "gaussian"]),
    }
)


@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])  # 0.5 s each
@given(config=CONFIGURATIONS, family=st.sampled_from([UNTIED, TIED]))
def test_random_configurations_compute_what_peft_computes(
    zoo: Zoo, tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any], family: str
) -> None:
    refuse_warnings()
    folder = tmp_path_factory.mktemp("adapter")
    save_peft_adapter(zoo(family), folder, **config)  # it sorts the patterns, so that the model it loads may be another
    trained = peft.PeftModel.from_pretrained(load_plain(zoo(family)), folder).eval()
    base, expected = read_dense(zoo(family), folder), logits(trained, IDS)
    torch.testing.assert_close(logits(base.model, IDS), expected, rtol=0, atol=2 * EXACT)
