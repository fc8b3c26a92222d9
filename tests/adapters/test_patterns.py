"""Ranks and alphas of single modules: PEFT's rule, PEFT's file, the same function, and the plan counts them exactly."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from support.command_line import qlora
from support.small_runs import adapter_tensors, recipe_of, run, write_rows
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora.adapters import ADAPTERS, peft_files
from qlora.adapters.dora import DoraLinear
from qlora.adapters.inject import adapted, inject
from qlora.adapters.patterns import by_pattern, refuse_idle
from qlora.errors import AdapterError, InputError
from qlora.model import Model
from qlora.model.load_base import Base, load
from qlora.quant import QUANTIZERS
from qlora.recipe.planning import elsewhere, plan_of

Zoo = Callable[..., Path]
pytestmark = pytest.mark.xdist_group("patterns")
FAMILY = "llama-tied-bias"
IDS = torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(0))
RANKS = {"q_proj": 8, r"layers\.1\.mlp\..*": 3}
ALPHAS = {"self_attn.k_proj": 5.0, "layers.0.mlp.up_proj": 2.5, "up_proj": 9.0}
PATHS = [f"model.layers.{layer}.{part}" for layer in (0, 1, 11) for part in ("self_attn.q_proj", "mlp.up_proj")]


def base_of(folder: Path, quantizer: str = "nf4") -> Base:
    return load(Model(name=str(folder), dtype="float32"), QUANTIZERS[quantizer](), torch.device("cpu"))


def plain(zoo: Zoo) -> Any:
    return AutoModelForCausalLM.from_pretrained(zoo(FAMILY), dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


@given(
    st.dictionaries(
        st.sampled_from(["q_proj", "proj", "mlp.up_proj", "up_proj", r"layers\.1\..*", r"1.mlp.up_proj", r".*q.*",
                         "model.layers.0.self_attn.q_proj", "k_proj|q_proj", r"\d+\.mlp\.up_proj", "layers.1"]),
        st.integers(1, 64),
    ),
    st.sampled_from(PATHS),
)  # fmt: skip
def test_the_key_that_counts_is_the_one_that_peft_takes(patterns: dict[str, int], path: str) -> None:
    assert by_pattern(patterns, path, 0) == patterns.get(get_pattern_key(list(patterns), path), 0)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_peft_reads_our_patterns_and_computes_the_same(zoo: Zoo, kind: str, tmp_path: Path) -> None:
    base = base_of(zoo(FAMILY), "dense")
    adapter = ADAPTERS[kind](4, 6.0, 0.0, RANKS, ALPHAS)
    inject(base.model, adapter, "all-linear", 0)
    for number, (path, layer) in enumerate(adapted(base.model).items()):
        torch.nn.init.normal_(layer.B, std=0.1, generator=torch.Generator().manual_seed(number))
        expected = 8 if path.endswith("q_proj") else 3 if ".1.mlp." in path else 4
        assert layer.rank == layer.A.shape[0] == layer.B.shape[1] == expected
        if isinstance(layer, DoraLinear):
            layer.magnitude.data *= torch.linspace(0.5, 1.5, len(layer.magnitude))
    peft_files.write(tmp_path, base.model, adapter, peft_files.Identity(str(zoo(FAMILY)), None, base.manifest.sha256))
    config = json.loads((tmp_path / peft_files.CONFIG).read_text())
    assert config["rank_pattern"] == RANKS and config["alpha_pattern"] == ALPHAS
    theirs = peft.PeftModel.from_pretrained(plain(zoo), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(base.model.eval()), rtol=0, atol=1e-4)  # float32 products
    fresh = base_of(zoo(FAMILY), "dense")
    peft_files.attach(fresh.model, peft_files.read(tmp_path), fresh.manifest.sha256)
    assert torch.equal(logits(fresh.model), logits(base.model))


@pytest.mark.parametrize("init", ["default", "pissa"])
@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_portable_of_a_run_with_patterns_is_the_run_in_peft(zoo: Zoo, kind: str, init: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 8)
    shown = (f"adapter.kind={kind}", f"adapter.init={init}", "optim.learning_rate=0.02", "train.max_steps=3")
    patterns = {"rank_pattern": RANKS, "alpha_pattern": ALPHAS}
    run(recipe_of(zoo(FAMILY), data, tmp_path / "run", *shown, adapter=patterns))
    assert qlora("export", tmp_path / "run", tmp_path / "portable", "--to", "portable").code == 0
    config = json.loads((tmp_path / "portable" / peft_files.CONFIG).read_text())
    widest = 8 * (2 if init == "pissa" else 1)  # where A and B started is taken away by as many columns again
    assert config["r"] == config["lora_alpha"] == widest and not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    ours, theirs = (peft.PeftModel.from_pretrained(plain(zoo), tmp_path / name).eval() for name in ("run", "portable"))
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-4)
    assert (logits(plain(zoo)) - logits(ours)).abs().max() > 0.1


def test_the_plan_counts_what_trains_exactly(zoo: Zoo, tmp_path: Path) -> None:
    for kind in ("lora", "dora"):
        section = {"kind": kind, "rank_pattern": RANKS}
        recipe = recipe_of(zoo("llama"), tmp_path / "none.jsonl", tmp_path / "run", adapter=section)
        planned = plan_of(recipe, elsewhere("24GiB", 1, None))
        injected = inject(base_of(zoo("llama")).model, ADAPTERS[kind](4, 8.0, 0.0, RANKS), "all-linear", 0)
        assert planned.as_json()["trainable_parameters"] == injected.trainable_parameters


def test_a_key_that_decides_nothing_is_an_error_with_its_name(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=re.escape("adapter.rank_pattern: 'q_prj' fits no adapted layer. Did you")):
        refuse_idle("adapter.rank_pattern", {"up_proj": 2, "q_prj": 3}, PATHS)
    with pytest.raises(AdapterError, match="has no effect: 'up_proj' stands before it"):
        refuse_idle("adapter.alpha_pattern", {"up_proj": 2, "mlp.up_proj": 3}, PATHS)
    data = write_rows(tmp_path / "rows.jsonl", 8)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {zoo('llama')}\ndata: {{train: {data}, max_length: 96}}\n"
        "adapter: {targets: [q_proj], alpha_pattern: {up_proj: 3}}\n"
    )
    for verb in ("check", "train"):
        said = qlora(verb, recipe, f"train.output={tmp_path / 'run'}")
        assert said.code == 2 and "adapter.alpha_pattern: 'up_proj' fits no adapted layer" in said.out + said.err


def test_a_run_goes_on_with_its_patterns_only(zoo: Zoo, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 8)

    def recipe(output: str, patterns: dict[str, int], *overrides: str) -> Any:
        options = ("train.save_every=2", *overrides)
        return recipe_of(zoo("llama"), data, tmp_path / output, *options, adapter={"rank_pattern": patterns})

    run(recipe("whole", RANKS))
    run(recipe("parts", RANKS, "train.max_steps=2"))
    run(recipe("parts", RANKS))
    whole, parts = adapter_tensors(tmp_path / "whole"), adapter_tensors(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    with pytest.raises(InputError, match=r"adapter\.rank_pattern"):
        run(recipe("parts", RANKS | {"k_proj": 2}, "train.max_steps=8"))
