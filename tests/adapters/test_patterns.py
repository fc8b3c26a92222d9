"""Rank and alpha patterns: matched as in PEFT, written to PEFT's file, and counted exactly by the plan."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from support.adapted_models import identity_of, load_base, load_plain, logits, randomize_adapter
from support.command_line import qlora
from support.small_runs import differing_tensors, recipe_of, run, write_records

from qlora.adapters import ADAPTERS, peft_files
from qlora.adapters.attach import attach
from qlora.adapters.inject import adapted, inject
from qlora.adapters.patterns import by_pattern, refuse_unused
from qlora.errors import AdapterError, InputError
from qlora.recipe.planning import Machine, Planner

Zoo = Callable[..., Path]
FAMILY = "llama-tied-bias"
RANKS = {"q_proj": 8, r"layers\.1\.mlp\..*": 3}
ALPHAS = {"self_attn.k_proj": 5.0, "layers.0.mlp.up_proj": 2.5, "up_proj": 9.0}
PATHS = [f"model.layers.{layer}.{name}" for layer in (0, 1, 11) for name in ("self_attn.q_proj", "mlp.up_proj")]


@given(
    st.dictionaries(
        st.sampled_from(["q_proj", "proj", "mlp.up_proj", "up_proj", r"layers\.1\..*", r"1.mlp.up_proj", r".*q.*",
                         "model.layers.0.self_attn.q_proj", "k_proj|q_proj", r"\d+\.mlp\.up_proj", "layers.1"]),
        st.integers(1, 64),
    ),
    st.sampled_from(PATHS),
)  # fmt: skip
def test_the_matching_key_is_the_one_that_peft_uses(patterns: dict[str, int], path: str) -> None:
    assert by_pattern(patterns, path, 0) == patterns.get(get_pattern_key(list(patterns), path), 0)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_peft_reads_our_patterns_and_computes_the_same(zoo: Zoo, kind: str, tmp_path: Path) -> None:
    base = load_base(zoo(FAMILY), "dense")
    adapter = ADAPTERS[kind](4, 6.0, 0.0, RANKS, ALPHAS)
    inject(base.model, adapter, "all-linear", 0)
    for path, layer in adapted(base.model).items():
        expected_rank = 8 if path.endswith("q_proj") else 3 if ".1.mlp." in path else 4
        assert layer.rank == layer.A.shape[0] == layer.B.shape[1] == expected_rank
    randomize_adapter(base.model)
    peft_files.write(tmp_path, base.model, adapter, identity_of(base))
    config = json.loads((tmp_path / peft_files.CONFIG).read_text())
    assert config["rank_pattern"] == RANKS and config["alpha_pattern"] == ALPHAS
    peft_model = peft.PeftModel.from_pretrained(load_plain(zoo(FAMILY)), tmp_path).eval()
    torch.testing.assert_close(logits(peft_model), logits(base.model.eval()), rtol=0, atol=1e-4)  # float32 products
    fresh = load_base(zoo(FAMILY), "dense")
    attach(fresh.model, peft_files.read(tmp_path), fresh.manifest.sha256)
    assert torch.equal(logits(fresh.model), logits(base.model))


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("init", ["default", "pissa"])
@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_a_portable_export_of_patterns_equals_the_run_in_peft(zoo: Zoo, kind: str, init: str, tmp_path: Path) -> None:
    data = write_records(tmp_path / "records.jsonl", 8)
    options = (f"adapter.kind={kind}", f"adapter.init={init}", "optim.learning_rate=0.02", "train.max_steps=3")
    patterns = {"rank_pattern": RANKS, "alpha_pattern": ALPHAS}
    run(recipe_of(zoo(FAMILY), data, tmp_path / "run", *options, adapter=patterns))
    assert qlora("export", tmp_path / "run", tmp_path / "portable", "--to", "portable").code == 0
    config = json.loads((tmp_path / "portable" / peft_files.CONFIG).read_text())
    largest_rank = 8 * (2 if init == "pissa" else 1)  # pissa adds A0 and B0
    assert config["r"] == config["lora_alpha"] == largest_rank and not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    run_logits, portable_logits = (
        logits(peft.PeftModel.from_pretrained(load_plain(zoo(FAMILY)), tmp_path / name).eval())
        for name in ("run", "portable")
    )
    torch.testing.assert_close(portable_logits, run_logits, rtol=0, atol=1e-4)
    assert (logits(load_plain(zoo(FAMILY))) - run_logits).abs().max() > 0.1


def test_the_plan_counts_trainable_parameters_exactly(zoo: Zoo, tmp_path: Path) -> None:
    for kind in ("lora", "dora"):
        section = {"kind": kind, "rank_pattern": RANKS}
        recipe = recipe_of(zoo("llama"), tmp_path / "none.jsonl", tmp_path / "run", adapter=section)
        plan = Planner(recipe).plan(Machine.described("24GiB"))
        injection = inject(load_base(zoo("llama")).model, ADAPTERS[kind](4, 8.0, 0.0, RANKS), "all-linear", 0)
        assert plan.as_json()["trainable_parameters"] == injection.trainable_parameters


def test_a_key_without_effect_is_an_error_with_its_name(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=re.escape("rank_pattern: 'q_prj' matches no adapted layer. Did you mean")):
        refuse_unused("adapter.rank_pattern", {"up_proj": 2, "q_prj": 3}, PATHS)
    with pytest.raises(AdapterError, match="has no effect: 'up_proj' comes before it"):
        refuse_unused("adapter.alpha_pattern", {"up_proj": 2, "mlp.up_proj": 3}, PATHS)
    data = write_records(tmp_path / "records.jsonl", 8)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {zoo('llama')}\ndata: {{train: {data}, max_length: 96}}\n"
        "adapter: {targets: [q_proj], alpha_pattern: {up_proj: 3}}\n"
    )
    for command in ("check", "train"):
        refused = qlora(command, recipe, f"train.output={tmp_path / 'run'}")
        assert refused.code == 2
        assert "adapter.alpha_pattern: 'up_proj' matches no adapted layer" in refused.out + refused.err


def test_a_run_resumes_with_the_same_patterns_only(zoo: Zoo, tmp_path: Path) -> None:
    data = write_records(tmp_path / "records.jsonl", 8)

    def train(output: str, patterns: dict[str, int], steps: int) -> None:
        options = ("train.save_every=2", f"train.max_steps={steps}")
        run(recipe_of(zoo("llama"), data, tmp_path / output, *options, adapter={"rank_pattern": patterns}))

    train("uninterrupted", RANKS, 3)
    train("resumed", RANKS, 2)
    train("resumed", RANKS, 3)
    assert differing_tensors(tmp_path / "uninterrupted", tmp_path / "resumed") == []
    with pytest.raises(InputError, match=r"adapter\.rank_pattern"):
        train("resumed", RANKS | {"k_proj": 2}, 4)
