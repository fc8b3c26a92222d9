"""Laws of full fine-tuning: it starts at the base, its gradients are autograd's, its folder is the model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.adapted_models import IDS, load_base, load_plain, logits
from support.command_line import qlora
from support.small_runs import metrics, recipe_of, run, write_records
from support.tiny_models import FAMILIES
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from qlora.adapters.full import Full
from qlora.errors import AdapterError, RecipeError
from qlora.recipe.planning import Machine, Planner
from qlora.recipe.recipe import Recipe
from qlora.runs.load_run import load_run
from qlora.training.loss import TokenLoss

Zoo = Callable[..., Path]
POSITIONS = torch.arange(24)[None].expand(2, -1)
SECTION = {"kind": "full", "rank": None, "alpha": None}


def full_recipe(model: Path, data: Path, output: Path, *overrides: str) -> Recipe:
    options = ("quant.kind=dense", "optim.learning_rate=0.002", *overrides)
    return recipe_of(model, data, output, *options, adapter=SECTION)


@pytest.mark.sample(of=3)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])  # slow on CPUs
@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_at_the_base_bit_for_bit_and_trains_everything(zoo: Zoo, family: str, dtype: str) -> None:
    base = load_base(zoo(family), "dense", dtype)
    before = logits(base.model)
    injection = Full().train_all(base.model)
    assert torch.equal(logits(base.model), before) and torch.equal(logits(base.model.train()), before)
    named = dict(base.model.named_parameters())
    assert all(value.requires_grad and value.dtype == torch.float32 for value in named.values())
    plain = AutoModelForCausalLM.from_pretrained(zoo(family))
    assert named.keys() == dict(plain.named_parameters()).keys()
    assert injection.trainable_parameters == injection.parameters == sum(p.numel() for p in plain.parameters())


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_is_that_of_plain_autograd(zoo: Zoo, family: str) -> None:
    base = load_base(zoo(family), "dense")
    Full().train_all(base.model)
    loss = TokenLoss(base.model).train()(IDS, IDS, POSITIONS)
    loss.backward()
    plain = AutoModelForCausalLM.from_pretrained(zoo(family), dtype=torch.float32, attn_implementation="eager").train()
    out = plain(input_ids=IDS).logits
    plain_loss = F.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum")
    plain_loss.backward()
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=0)
    plain_parameters = dict(plain.named_parameters())
    for name, value in base.model.named_parameters():
        assert value.grad is not None and value.grad.dtype == torch.float32, name
        expected = plain_parameters[name].grad
        assert expected is not None
        # float32 sums in another order, relative to the largest entry
        torch.testing.assert_close(value.grad, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()) + 1e-7)


def test_a_base_in_4_bits_is_refused_with_the_key(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"adapter\.kind.*quant\.kind: dense"):
        recipe_of(zoo("llama"), tmp_path, tmp_path / "run", adapter=SECTION)
    with pytest.raises(AdapterError, match="is stored as nf4"):
        Full().train_all(load_base(zoo("llama"), "nf4").model)


@pytest.mark.sample(of=3)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])  # slow on CPUs
@pytest.mark.parametrize("family", ["llama-tied-bias", "gpt_neox", "gemma3"])
def test_the_folder_is_the_model_that_was_trained(zoo: Zoo, family: str, dtype: str, tmp_path: Path) -> None:
    data = write_records(tmp_path / "records.jsonl", 8)
    options = (f"model.dtype={dtype}", "train.max_steps=3", "train.save_every=3", "data.eval_fraction=0.25")
    manifest = run(full_recipe(zoo(family), data, tmp_path / "run", *options))
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] and not list((tmp_path / "run").glob("adapter*"))
    plain, loaded = load_plain(tmp_path / "run", getattr(torch, dtype)), load_run(str(tmp_path / "run"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").dtype == getattr(torch, dtype)
    assert loaded.adapter is None
    tolerance = 1e-4 if dtype == "float32" else 0.1
    torch.testing.assert_close(logits(plain).float(), logits(loaded.base.model).float(), rtol=0, atol=tolerance)
    result = qlora("eval", tmp_path / "run", "--json").json
    assert result["loss"] == pytest.approx(manifest["result"]["eval_loss"], rel=1e-6)
    checkpoint = tmp_path / "run" / "checkpoint-000003"
    again = qlora("eval", checkpoint, "--json").json
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-6)  # master weights, rounded to the same weights
    master_weights = load_file(checkpoint / "model.safetensors")
    assert {value.dtype for value in master_weights.values()} == {torch.float32}
    assert qlora("generate", tmp_path / "run", "one", "--max-new-tokens", 2).code == 0


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_a_resumed_run_equals_an_uninterrupted_one(zoo: Zoo, kind: str, tmp_path: Path) -> None:
    data, base = write_records(tmp_path / "records.jsonl", 8), zoo("llama-tied-bias")
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    options = (f"optim.kind={kind}", "train.save_every=2")
    run(full_recipe(base, data, uninterrupted, *options))
    run(full_recipe(base, data, resumed, *options, "train.max_steps=2"))
    run(full_recipe(base, data, resumed, *options))
    assert_same_tensors(uninterrupted, resumed)
    assert metrics(uninterrupted) == metrics(resumed)


def assert_same_tensors(first: Path, second: Path) -> None:
    first_tensors, second_tensors = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert first_tensors.keys() == second_tensors.keys()
    assert all(torch.equal(first_tensors[name], second_tensors[name]) for name in first_tensors)


def test_it_is_exported_as_a_model_and_is_not_an_adapter(zoo: Zoo, tmp_path: Path) -> None:
    data, source, out = write_records(tmp_path / "records.jsonl", 8), tmp_path / "run", tmp_path / "out"
    run(full_recipe(zoo("llama"), data, source, "data.eval_fraction=0.25", "train.max_steps=2"))
    agreement = qlora("export", source, tmp_path / "merged", "--to", "merged", "--json").json["agreement"]
    assert agreement["top1"] == 1.0 and agreement["max_logit_difference"] == 0.0
    assert_same_tensors(source, tmp_path / "merged")
    assert "Every weight was trained" in (tmp_path / "merged" / "README.md").read_text()
    for arguments in (
        ("export", source, out, "--to", "adapter"),
        ("export", source, out, "--to", "portable"),
        ("inspect", source),
        ("resize", source, out, "--rank", 2),
        ("eval", source, "--beside-base"),
    ):
        refused = qlora(*arguments)
        assert refused.code == 2 and "trained every weight" in refused.err, arguments
        assert "Traceback" not in refused.err, arguments
    assert not out.exists()
    damaged = source / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    refused = qlora("eval", source)
    assert refused.code == 2 and "damaged" in refused.err


def test_the_plan_counts_every_weight_its_gradient_and_its_moments(zoo: Zoo, tmp_path: Path) -> None:
    for family in FAMILIES:
        recipe = full_recipe(zoo(family), tmp_path / "none", tmp_path / "run")
        plan = Planner(recipe).plan(Machine.described("24GiB", 1, None))
        plain = AutoModelForCausalLM.from_pretrained(zoo(family))
        values = sum(value.numel() for value in plain.parameters())
        assert plan.as_json()["trainable_parameters"] == values
        owners = plan.phases["update"]
        assert (owners["adapters"], owners["gradients"], owners["optimizer"]) == (4 * values, 4 * values, 8 * values)
        assert owners["packed_base"] == owners["embeddings"] == owners["head"] == owners["norms"] == 0
    assert json.loads(json.dumps(plan.as_json()))["choice"]["weights"] == "resident"
