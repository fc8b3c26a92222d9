"""Modules that train whole beside the updates: as plain autograd trains them, in PEFT's file, merged, and counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.command_line import qlora
from support.small_runs import adapter_tensors, metrics, recipe_of, run, write_rows
from support.tiny_models import FAMILIES
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from qlora.adapters import peft_files
from qlora.adapters.inject import adapted, count, inject
from qlora.adapters.lora import Lora
from qlora.adapters.modules_to_save import save, saved_modules, saved_tensors
from qlora.adapters.switch import AdapterSwitch, adapters_off
from qlora.errors import AdapterError
from qlora.model import Model
from qlora.model.load_base import Base, load
from qlora.quant import QUANTIZERS
from qlora.recipe.planning import elsewhere, plan_of
from qlora.runs.load_run import load_run
from qlora.training.loss import TokenLoss

Zoo = Callable[..., Path]
pytestmark = pytest.mark.xdist_group("saved")
TIED, UNTIED = "llama-tied-bias", "llama"
IDS = torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(24)[None].expand(2, -1)
ENDS = ("embed_tokens", "lm_head", "norm", "layers.0.input_layernorm")


def base_of(folder: Path, quantizer: str = "dense", dtype: str = "float32") -> Base:
    return load(Model(name=str(folder), dtype=dtype), QUANTIZERS[quantizer](), torch.device("cpu"))


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def names_in(family: str) -> tuple[str, ...]:
    return ("embed_in", "lm_head", "final_layer_norm") if family == "gpt_neox" else ENDS[:3]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_at_the_base_and_every_gradient_is_that_of_autograd(zoo: Zoo, family: str, quantizer: str) -> None:
    base = base_of(zoo(family), quantizer)
    before = logits(base.model)
    inject(base.model, Lora(2, 4.0), "all-linear", 0)
    save(base.model, names_in(family))
    assert torch.equal(logits(base.model), before)
    TokenLoss(base.model).train()(IDS, IDS, POSITIONS).backward()
    if quantizer != "dense":
        return
    theirs = AutoModelForCausalLM.from_pretrained(zoo(family), dtype=torch.float32, attn_implementation="eager").train()
    out = theirs(input_ids=IDS).logits
    F.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").backward()
    expected = dict(theirs.named_parameters(remove_duplicate=False))
    for name, value in saved_tensors(base.model):
        assert value.dtype == torch.float32 and value.grad is not None
        wanted = expected[name].grad
        assert wanted is not None
        torch.testing.assert_close(value.grad, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_masters_are_float32_and_the_model_computes_in_the_bases_dtype(zoo: Zoo) -> None:
    base = base_of(zoo(UNTIED), "nf4", "bfloat16")
    before = logits(base.model)
    save(base.model, ENDS)
    assert len(saved_modules(base.model)) == 4 and torch.equal(logits(base.model), before)
    assert {value.dtype for _, value in saved_tensors(base.model)} == {torch.float32}
    for _, value in saved_tensors(base.model):
        value.data.mul_(1.1)
    assert not torch.equal(logits(base.model), before)
    with adapters_off(base.model):
        assert torch.equal(logits(base.model), before)


def trained_run(zoo: Zoo, family: str, folder: Path, names: tuple[str, ...], *overrides: str) -> Path:
    data = write_rows(folder / "rows.jsonl", 12)
    shown = ("train.max_steps=3", "optim.learning_rate=0.01", "data.eval_fraction=0.25", *overrides)
    run(recipe_of(zoo(family), data, folder / "run", *shown, adapter={"save_modules": list(names)}))
    return folder / "run"


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(("family", "names"), [
    (UNTIED, ("embed_tokens", "lm_head")), (UNTIED, ("norm",)), (UNTIED, ("lm_head", "layers.0.input_layernorm")),
    (TIED, ("embed_tokens",)), (TIED, ("lm_head", "norm")), ("gemma3", ("q_norm", "embed_tokens")),
    ("gpt_neox", ("embed_in", "lm_head", "input_layernorm")), ("gemma2", ("post_feedforward_layernorm",)),
])  # fmt: skip
def test_peft_reads_the_run_and_so_does_the_merged_model(
    zoo: Zoo, family: str, names: tuple[str, ...], kind: str, tmp_path: Path
) -> None:
    folder = trained_run(zoo, family, tmp_path, names, "quant.kind=dense", f"adapter.kind={kind}")
    opened = load_run(str(folder))
    ours = logits(opened.base.model)
    theirs = peft.PeftModel.from_pretrained(plain(zoo(family)), folder).eval()
    torch.testing.assert_close(logits(theirs), ours, rtol=0, atol=1e-4 if kind == "lora" else 1e-3)
    moved = [
        name
        for name, value in saved_tensors(opened.base.model)
        if not torch.equal(value, plain(zoo(family)).get_parameter(name))
    ]
    assert moved and {name.rpartition(".")[0] for name in moved} == set(saved_modules(opened.base.model))
    found = qlora("export", folder, tmp_path / "merged", "--to", "merged", "--json")
    assert found.json["agreement"]["top1"] == 1.0 and found.json["agreement"]["max_logit_difference"] <= 1e-4
    torch.testing.assert_close(logits(plain(tmp_path / "merged")), ours, rtol=0, atol=1e-4)
    tied = json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    assert tied == (family in (TIED, "gemma3", "gemma2"))
    for target in ("portable",):
        said = qlora("export", folder, tmp_path / target, "--to", target)
        assert said.code == 2 and "trained whole" in said.err


def test_on_a_tied_base_either_name_means_both_and_they_stay_one(zoo: Zoo, tmp_path: Path) -> None:
    base = base_of(zoo(TIED), "nf4")
    assert save(base.model, ["lm_head"]) == ["model.embed_tokens", "lm_head"]
    embedding, head = saved_modules(base.model).values()
    assert embedding.weight is head.weight
    assert count(base.model).trainable_parameters == embedding.weight.numel()
    folder = trained_run(zoo, TIED, tmp_path, ("embed_tokens",))
    stored = adapter_tensors(folder)
    ends = [stored[f"base_model.model.{name}.weight"] for name in ("model.embed_tokens", "lm_head")]
    assert torch.equal(*ends)
    assert json.loads((folder / peft_files.CONFIG).read_text())["modules_to_save"] == ["embed_tokens", "lm_head"]


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_we_read_what_peft_kept_tied(zoo: Zoo, names: list[str], tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=names, ensure_weight_tying=True, task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(plain(zoo(TIED)), config).eval()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if "modules_to_save" in name:
                value.mul_(1.3)
    theirs.save_pretrained(tmp_path)
    base = base_of(zoo(TIED))
    peft_files.attach(base.model, peft_files.read(tmp_path), base.manifest.sha256)
    torch.testing.assert_close(logits(base.model), logits(theirs), rtol=0, atol=1e-4)
    assert len(saved_modules(base.model)) == 2


def test_where_peft_trained_the_two_apart_the_merged_model_has_two(zoo: Zoo, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(plain(zoo(TIED)), config).eval()
    with torch.no_grad():
        theirs.base_model.model.model.embed_tokens.weight.mul_(1.5)
    theirs.save_pretrained(tmp_path / "theirs")
    opened = load_run(str(zoo(TIED)), str(tmp_path / "theirs"))
    dense = base_of(zoo(TIED))
    peft_files.attach(dense.model, peft_files.read(tmp_path / "theirs"), dense.manifest.sha256)
    torch.testing.assert_close(logits(dense.model), logits(theirs), rtol=0, atol=1e-4)
    assert opened.adapter is not None and list(opened.adapter.modules) == ["model.embed_tokens.weight"]
    folder = tmp_path / "source"
    folder.mkdir()
    for file in (tmp_path / "theirs").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / peft_files.CONFIG).read_text()) | {"base_model_name_or_path": str(zoo(TIED))}
    (folder / peft_files.CONFIG).write_text(json.dumps(config))
    assert qlora("export", folder, tmp_path / "merged", "--to", "merged", "--rows", 0).code == 0
    opened = load_run(str(folder))
    merged = plain(tmp_path / "merged")
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    torch.testing.assert_close(logits(merged), logits(opened.base.model), rtol=0, atol=1e-4)


def test_a_resumed_run_is_the_one_that_was_never_stopped(zoo: Zoo, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 8)
    for family in (UNTIED, TIED):

        def recipe(output: str, *overrides: str, family: str = family) -> Any:
            section = {"save_modules": ["embed_tokens", "norm"]}
            output = str(tmp_path / f"{family}-{output}")
            return recipe_of(zoo(family), data, Path(output), "train.save_every=2", *overrides, adapter=section)

        run(recipe("whole"))
        run(recipe("parts", "train.max_steps=2"))
        run(recipe("parts"))
        whole, parts = (tmp_path / f"{family}-{name}" for name in ("whole", "parts"))
        ours, theirs = adapter_tensors(whole), adapter_tensors(parts)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours) and metrics(whole) == metrics(parts)


def test_the_plan_counts_them(zoo: Zoo, tmp_path: Path) -> None:
    for family in FAMILIES:
        for names in (names_in(family), names_in(family)[1:2], ("layers.1.input_layernorm",)):
            recipe = recipe_of(zoo(family), tmp_path / "none", tmp_path / "run", adapter={"save_modules": list(names)})
            base = base_of(zoo(family), "nf4")
            inject(base.model, Lora(4, 8.0), "all-linear", 0)
            save(base.model, names)
            planned = plan_of(recipe, elsewhere("24GiB", 1, None)).as_json()
            assert planned["trainable_parameters"] == count(base.model).trainable_parameters, (family, names)


def test_what_cannot_train_whole_is_refused_with_the_key(zoo: Zoo) -> None:
    base = base_of(zoo(UNTIED), "nf4")
    with pytest.raises(AdapterError, match=r"adapter\.save_modules: 'lmhead' means no module.*\[lm_head\]"):
        save(base.model, ["lmhead"])
    with pytest.raises(AdapterError, match=r"adapter\.save_modules: model\.layers\.0\..*q_proj is stored as nf4"):
        save(base.model, ["q_proj"])
    inject(base.model, Lora(2, 4.0), ["q_proj"], 0)
    with pytest.raises(AdapterError, match=r"'q_proj' is adapted by adapter\.targets already"):
        save(base.model, ["q_proj"])
    assert not saved_modules(base.model)


def test_a_switch_holds_them_and_gives_the_base_back(zoo: Zoo, tmp_path: Path) -> None:
    folder = trained_run(zoo, UNTIED, tmp_path, ("embed_tokens", "lm_head", "norm"))
    alone = load_run(str(folder))
    base = base_of(zoo(UNTIED), "nf4")
    before = logits(base.model)
    switch = AdapterSwitch(base.model)
    layers, _ = peft_files.fitted(base.model, peft_files.read(folder), base.manifest.sha256)
    switch.hold("a", layers)
    switch.use("a")
    assert torch.equal(logits(base.model), logits(alone.base.model))
    switch.use(None)
    assert torch.equal(logits(base.model), before) and not adapted(base.model)
    with switch.rows(("a", None)):
        mixed = logits(base.model)
    torch.testing.assert_close(mixed[0], logits(alone.base.model)[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], before[1], rtol=0, atol=1e-5)


def test_a_damaged_module_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    folder = trained_run(zoo, UNTIED, tmp_path, ("norm",))
    tensors = load_file(folder / peft_files.WEIGHTS)
    key = "base_model.model.model.norm.weight"
    base = base_of(zoo(UNTIED), "nf4")
    for wrong in (torch.ones(3), torch.full_like(tensors[key], float("nan"))):
        copy = tmp_path / f"copy{wrong.numel()}"
        copy.mkdir()
        (copy / peft_files.WEIGHTS).write_bytes(peft_files.serialize(tensors | {key: wrong}))
        (copy / peft_files.CONFIG).write_bytes((folder / peft_files.CONFIG).read_bytes())
        with pytest.raises(AdapterError, match=r"norm\.weight is .*needed: \[64\] finite numbers"):
            peft_files.attach(base.model, peft_files.read(copy), base.manifest.sha256)
        assert not saved_modules(base.model) and not adapted(base.model)
