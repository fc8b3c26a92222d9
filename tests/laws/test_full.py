"""Laws of full fine-tuning: it begins at the base, every weight learns as autograd says, its folder is the model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.command_line import qlora
from support.small_runs import metrics, recipe_of, run, write_rows
from support.tiny_models import FAMILIES
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from qlora.adapters.full import Full
from qlora.errors import AdapterError, RecipeError
from qlora.model import Model
from qlora.model.load_base import Base, load
from qlora.quant import QUANTIZERS
from qlora.recipe.planning import elsewhere, plan_of
from qlora.runs.load_run import load_run
from qlora.training.loss import TokenLoss

Zoo = Callable[..., Path]
pytestmark = pytest.mark.xdist_group("full")
IDS = torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(24)[None].expand(2, -1)
FULL = ("adapter.kind=full", "quant.kind=dense", "optim.learning_rate=0.002")


def base_of(folder: Path, quantizer: str = "dense", dtype: str = "float32") -> Base:
    return load(Model(name=str(folder), dtype=dtype), QUANTIZERS[quantizer](), torch.device("cpu"))


def full_recipe(model: Path, data: Path, output: Path, *overrides: str) -> Any:
    section = {"kind": "full"}
    return recipe_of(model, data, output, *FULL[1:], *overrides, adapter=section | {"rank": None, "alpha": None})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_at_the_base_bit_for_bit_and_all_of_it_trains(zoo: Zoo, family: str, dtype: str) -> None:
    base = base_of(zoo(family), dtype=dtype)
    before = logits(base.model)
    injected = Full().train_all(base.model)
    assert torch.equal(logits(base.model), before) and torch.equal(logits(base.model.train()), before)
    named = dict(base.model.named_parameters())
    assert all(value.requires_grad and value.dtype == torch.float32 for value in named.values())
    plain = AutoModelForCausalLM.from_pretrained(zoo(family))
    assert named.keys() == dict(plain.named_parameters()).keys()
    assert injected.trainable_parameters == injected.parameters == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_is_that_of_plain_autograd(zoo: Zoo, family: str) -> None:
    base = base_of(zoo(family))
    Full().train_all(base.model)
    loss = TokenLoss(base.model).train()(IDS, IDS, POSITIONS)
    loss.backward()
    plain = AutoModelForCausalLM.from_pretrained(zoo(family), dtype=torch.float32, attn_implementation="eager").train()
    out = plain(input_ids=IDS).logits
    theirs = F.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum")
    theirs.backward()
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=0)
    expected = dict(plain.named_parameters())
    for name, value in base.model.named_parameters():
        assert value.grad is not None and value.grad.dtype == torch.float32, name
        wanted = expected[name].grad
        assert wanted is not None
        # float32 sums in another order, relative to the longest entry
        torch.testing.assert_close(value.grad, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()) + 1e-7)


def test_a_base_in_4_bits_is_refused_with_the_key(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"adapter\.kind.*quant\.kind: dense"):
        recipe_of(zoo("llama"), tmp_path, tmp_path / "run", adapter={"kind": "full", "rank": None, "alpha": None})
    with pytest.raises(AdapterError, match="is stored as nf4"):
        Full().train_all(base_of(zoo("llama"), "nf4").model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama-tied-bias", "gpt_neox", "gemma3"])
def test_the_folder_is_the_model_that_was_trained(zoo: Zoo, family: str, dtype: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 8)
    shown = (f"model.dtype={dtype}", "train.max_steps=3", "train.save_every=3", "data.eval_fraction=0.25")
    manifest = run(full_recipe(zoo(family), data, tmp_path / "run", *shown))
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] and not list((tmp_path / "run").glob("adapter*"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    assert plain.dtype == getattr(torch, dtype)
    opened = load_run(str(tmp_path / "run"))
    assert opened.adapter is None
    torch.testing.assert_close(
        logits(plain).float(), logits(opened.base.model).float(), rtol=0, atol=1e-4 if dtype == "float32" else 0.1
    )
    said = qlora("eval", tmp_path / "run", "--json").json
    assert said["loss"] == pytest.approx(manifest["result"]["eval_loss"], rel=1e-6)
    again = qlora("eval", tmp_path / "run" / "checkpoint-000003", "--json").json
    assert again["loss"] == pytest.approx(said["loss"], rel=1e-6)  # masters, rounded to the same weights
    masters = load_file(tmp_path / "run" / "checkpoint-000003" / "model.safetensors")
    assert {value.dtype for value in masters.values()} == {torch.float32}
    assert qlora("generate", tmp_path / "run", "one", "--max-new-tokens", 2).code == 0


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_a_resumed_run_is_the_one_that_was_never_stopped(zoo: Zoo, kind: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 8)
    options = (f"optim.kind={kind}", "train.save_every=2")
    run(full_recipe(zoo("llama-tied-bias"), data, tmp_path / "whole", *options))
    run(full_recipe(zoo("llama-tied-bias"), data, tmp_path / "parts", *options, "train.max_steps=2"))
    run(full_recipe(zoo("llama-tied-bias"), data, tmp_path / "parts", *options))
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_it_is_exported_as_a_model_and_is_no_adapter(zoo: Zoo, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 8)
    run(full_recipe(zoo("llama"), data, tmp_path / "run", "data.eval_fraction=0.25", "train.max_steps=2"))
    found = qlora("export", tmp_path / "run", tmp_path / "merged", "--to", "merged", "--json").json
    assert found["agreement"]["top1"] == 1.0 and found["agreement"]["max_logit_difference"] == 0.0
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "merged"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "Every weight was trained" in (tmp_path / "merged" / "README.md").read_text()
    source, out = tmp_path / "run", tmp_path / "a"
    exports = [("export", source, out, "--to", target) for target in ("adapter", "portable")]
    for verb in (
        *exports,
        ("inspect", source),
        ("resize", source, out, "--rank", 2),
        ("eval", source, "--beside-base"),
    ):
        said = qlora(*verb)
        assert said.code == 2 and "trained every weight" in said.err and "Traceback" not in said.err, verb
    assert not (tmp_path / "a").exists()
    changed = tmp_path / "run" / "model.safetensors"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\x7f")
    said = qlora("eval", tmp_path / "run")
    assert said.code == 2 and "damaged" in said.err


def test_the_plan_counts_every_weight_its_gradient_and_its_moments(zoo: Zoo, tmp_path: Path) -> None:
    for family in FAMILIES:
        recipe = full_recipe(zoo(family), tmp_path / "none", tmp_path / "run")
        planned = plan_of(recipe, elsewhere("24GiB", 1, None))
        plain = AutoModelForCausalLM.from_pretrained(zoo(family))
        values = sum(value.numel() for value in plain.parameters())
        assert planned.as_json()["trainable_parameters"] == values
        owners = planned.phases["update"]
        assert (owners["adapters"], owners["gradients"], owners["optimizer"]) == (4 * values, 4 * values, 8 * values)
        assert owners["packed_base"] == owners["embeddings"] == owners["head"] == owners["norms"] == 0
    assert json.loads(json.dumps(planned.as_json()))["choice"]["weights"] == "resident"
