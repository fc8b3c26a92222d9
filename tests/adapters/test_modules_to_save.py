"""Modules to save: gradients equal autograd's, PEFT reads them, they are merged, and the plan counts them."""

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.adapted_models import IDS, build_adapter, load_base, load_plain, logits
from support.command_line import qlora
from support.small_runs import adapter_tensors, differing_tensors, metrics, recipe_of, run, write_records
from support.tiny_models import FAMILIES
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from qlora.adapters import peft_files
from qlora.adapters.attach import attach, build_layers
from qlora.adapters.inject import adapted, count, inject
from qlora.adapters.modules_to_save import add_modules_to_save, modules_to_save, weights_to_save
from qlora.adapters.switch import AdapterSwitch, disable_adapters
from qlora.errors import AdapterError
from qlora.quant import QUANTIZERS
from qlora.recipe.planning import Machine, Planner
from qlora.runs.load_run import load_run
from qlora.training.loss import TokenLoss

Zoo = Callable[..., Path]
TIED, UNTIED = "llama-tied-bias", "llama"
POSITIONS = torch.arange(24)[None].expand(2, -1)
NAMES = ("embed_tokens", "lm_head", "norm", "layers.0.input_layernorm")


def names_in(family: str) -> tuple[str, ...]:
    return ("embed_in", "lm_head", "final_layer_norm") if family == "gpt_neox" else NAMES[:3]


@pytest.mark.sample(of=4, every=("quantizer",))
@pytest.mark.parametrize(
    ("family", "quantizer"), [*((family, "dense") for family in FAMILIES), *((TIED, kind) for kind in QUANTIZERS)]
)
def test_it_starts_at_the_base_and_every_gradient_is_autograds(zoo: Zoo, family: str, quantizer: str) -> None:
    base = load_base(zoo(family), quantizer)
    before = logits(base.model)
    inject(base.model, build_adapter(rank=2, alpha=4.0), "all-linear", 0)
    add_modules_to_save(base.model, names_in(family))
    assert torch.equal(logits(base.model), before)
    TokenLoss(base.model).train()(IDS, IDS, POSITIONS).backward()
    if quantizer != "dense":
        return
    plain = AutoModelForCausalLM.from_pretrained(zoo(family), dtype=torch.float32, attn_implementation="eager").train()
    out = plain(input_ids=IDS).logits
    F.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").backward()
    plain_parameters = dict(plain.named_parameters(remove_duplicate=False))
    for name, value in weights_to_save(base.model):
        assert value.dtype == torch.float32 and value.grad is not None
        expected = plain_parameters[name].grad
        assert expected is not None
        torch.testing.assert_close(value.grad, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_master_weights_are_float32_and_the_model_has_the_bases_dtype(zoo: Zoo) -> None:
    base = load_base(zoo(UNTIED), "nf4", "bfloat16")
    before = logits(base.model)
    add_modules_to_save(base.model, NAMES)
    assert len(modules_to_save(base.model)) == 4 and torch.equal(logits(base.model), before)
    assert {value.dtype for _, value in weights_to_save(base.model)} == {torch.float32}
    for _, value in weights_to_save(base.model):
        value.data.mul_(1.1)
    assert not torch.equal(logits(base.model), before)
    with disable_adapters(base.model):
        assert torch.equal(logits(base.model), before)


def trained_run(zoo: Zoo, family: str, folder: Path, names: tuple[str, ...], *overrides: str) -> Path:
    data = write_records(folder / "records.jsonl", 12)
    options = ("train.max_steps=3", "optim.learning_rate=0.01", "data.eval_fraction=0.25", *overrides)
    run(recipe_of(zoo(family), data, folder / "run", *options, adapter={"save_modules": list(names)}))
    return folder / "run"


TRAINED = [
    (UNTIED, ("embed_tokens", "lm_head")), (UNTIED, ("norm",)), (UNTIED, ("lm_head", "layers.0.input_layernorm")),
    (TIED, ("embed_tokens",)), (TIED, ("lm_head", "norm")), ("gemma3", ("q_norm", "embed_tokens")),
    ("gpt_neox", ("embed_in", "lm_head", "input_layernorm")), ("gemma2", ("post_feedforward_layernorm",)),
]  # fmt: skip
# One kind of adapter with each of them, both with the first.
CASES = [
    pytest.param(*modules, kind, marks=[pytest.mark.slow] if number and number % 2 != place else [])
    for number, modules in enumerate(TRAINED)
    for place, kind in enumerate(("lora", "dora"))
]


@pytest.mark.sample(of=6, every=("kind",))
@pytest.mark.parametrize(("family", "names", "kind"), CASES)
def test_peft_and_the_merged_model_give_the_runs_logits(
    zoo: Zoo, family: str, names: tuple[str, ...], kind: str, tmp_path: Path
) -> None:
    folder = trained_run(zoo, family, tmp_path, names, "quant.kind=dense", f"adapter.kind={kind}")
    loaded, plain = load_run(str(folder)), load_plain(zoo(family))
    expected = logits(loaded.base.model)
    changed = [
        name for name, value in weights_to_save(loaded.base.model) if not torch.equal(value, plain.get_parameter(name))
    ]
    assert changed and {name.rpartition(".")[0] for name in changed} == set(modules_to_save(loaded.base.model))
    peft_model = peft.PeftModel.from_pretrained(plain, folder).eval()
    torch.testing.assert_close(logits(peft_model), expected, rtol=0, atol=1e-4 if kind == "lora" else 1e-3)
    agreement = qlora("export", folder, tmp_path / "merged", "--to", "merged", "--json").json["agreement"]
    assert agreement["top1"] == 1.0 and agreement["max_logit_difference"] <= 1e-4
    torch.testing.assert_close(logits(load_plain(tmp_path / "merged")), expected, rtol=0, atol=1e-4)
    tied = json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    assert tied == (family in (TIED, "gemma3", "gemma2"))
    refused = qlora("export", folder, tmp_path / "portable", "--to", "portable")
    assert refused.code == 2 and "trained in full" in refused.err


def test_on_a_tied_base_either_name_means_both_and_they_stay_tied(zoo: Zoo, tmp_path: Path) -> None:
    base = load_base(zoo(TIED), "nf4")
    assert add_modules_to_save(base.model, ["lm_head"]) == ["model.embed_tokens", "lm_head"]
    embedding, head = modules_to_save(base.model).values()
    assert embedding.weight is head.weight
    assert count(base.model).trainable_parameters == embedding.weight.numel()
    folder = trained_run(zoo, TIED, tmp_path, ("embed_tokens",))
    stored = adapter_tensors(folder)
    assert torch.equal(*(stored[f"base_model.model.{name}.weight"] for name in ("model.embed_tokens", "lm_head")))
    assert json.loads((folder / peft_files.CONFIG).read_text())["modules_to_save"] == ["embed_tokens", "lm_head"]


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_modules_that_peft_kept_tied_are_read(zoo: Zoo, names: list[str], tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=names, ensure_weight_tying=True, task_type="CAUSAL_LM",
    )  # fmt: skip
    peft_model = peft.get_peft_model(load_plain(zoo(TIED)), config).eval()
    with torch.no_grad():
        for name, value in peft_model.named_parameters():
            if "modules_to_save" in name:
                value.mul_(1.3)
    peft_model.save_pretrained(tmp_path)
    base = load_base(zoo(TIED), "dense")
    attach(base.model, peft_files.read(tmp_path), base.manifest.sha256)
    torch.testing.assert_close(logits(base.model), logits(peft_model), rtol=0, atol=1e-4)
    assert len(modules_to_save(base.model)) == 2


def test_an_embedding_that_peft_untied_is_merged_with_a_head_of_its_own(zoo: Zoo, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    peft_model = peft.get_peft_model(load_plain(zoo(TIED)), config).eval()
    with torch.no_grad():
        peft_model.base_model.model.model.embed_tokens.weight.mul_(1.5)
    folder = tmp_path / "adapter"
    peft_model.save_pretrained(folder)
    loaded = load_run(str(zoo(TIED)), str(folder))
    dense = load_base(zoo(TIED), "dense")
    attach(dense.model, peft_files.read(folder), dense.manifest.sha256)
    torch.testing.assert_close(logits(dense.model), logits(peft_model), rtol=0, atol=1e-4)
    assert loaded.adapter is not None and list(loaded.adapter.modules) == ["model.embed_tokens.weight"]
    settings = json.loads((folder / peft_files.CONFIG).read_text())
    (folder / peft_files.CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": str(zoo(TIED))}))
    assert qlora("export", folder, tmp_path / "merged", "--to", "merged", "--rows", 0).code == 0
    merged = load_plain(tmp_path / "merged")
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    torch.testing.assert_close(logits(merged), logits(load_run(str(folder)).base.model), rtol=0, atol=1e-4)


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("family", [UNTIED, TIED])
def test_a_resumed_run_equals_an_uninterrupted_one(zoo: Zoo, family: str, tmp_path: Path) -> None:
    data = write_records(tmp_path / "records.jsonl", 8)
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"

    def train(output: Path, steps: int) -> None:
        options = ("train.save_every=2", f"train.max_steps={steps}")
        section = {"save_modules": ["embed_tokens", "norm"]}
        run(recipe_of(zoo(family), data, output, *options, adapter=section))

    train(uninterrupted, 3)
    train(resumed, 2)
    train(resumed, 3)
    assert differing_tensors(uninterrupted, resumed) == [] and metrics(uninterrupted) == metrics(resumed)


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_counts_modules_to_save(zoo: Zoo, family: str, tmp_path: Path) -> None:
    for names in (names_in(family), names_in(family)[1:2], ("layers.1.input_layernorm",)):
        recipe = recipe_of(zoo(family), tmp_path / "none", tmp_path / "run", adapter={"save_modules": list(names)})
        base = load_base(zoo(family), "nf4")
        inject(base.model, build_adapter(rank=4), "all-linear", 0)
        add_modules_to_save(base.model, names)
        plan = Planner(recipe).plan(Machine.described("24GiB")).as_json()
        assert plan["trainable_parameters"] == count(base.model).trainable_parameters, names


def test_a_module_that_cannot_train_in_full_is_refused_with_the_key(zoo: Zoo) -> None:
    base = load_base(zoo(UNTIED), "nf4")
    with pytest.raises(AdapterError, match=r"adapter\.save_modules: 'lmhead' matches no module.*\[lm_head\]"):
        add_modules_to_save(base.model, ["lmhead"])
    with pytest.raises(AdapterError, match=r"adapter\.save_modules: model\.layers\.0\..*q_proj is stored as nf4"):
        add_modules_to_save(base.model, ["q_proj"])
    inject(base.model, build_adapter(rank=2), ["q_proj"], 0)
    with pytest.raises(AdapterError, match=r"'q_proj' is adapted by adapter\.targets already"):
        add_modules_to_save(base.model, ["q_proj"])
    assert not modules_to_save(base.model)


def test_a_switch_activates_them_and_restores_the_base(zoo: Zoo, tmp_path: Path) -> None:
    folder = trained_run(zoo, UNTIED, tmp_path, ("embed_tokens", "lm_head", "norm"))
    trained = logits(load_run(str(folder)).base.model)
    base = load_base(zoo(UNTIED), "nf4")
    before = logits(base.model)
    switch = AdapterSwitch(base.model)
    layers, _ = build_layers(base.model, peft_files.read(folder), base.manifest.sha256)
    switch.add("a", layers)
    switch.activate("a")
    assert torch.equal(logits(base.model), trained)
    switch.activate(None)
    assert torch.equal(logits(base.model), before) and not adapted(base.model)
    with switch.per_row(("a", None)):
        mixed = logits(base.model)
    torch.testing.assert_close(mixed[0], trained[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], before[1], rtol=0, atol=1e-5)


def test_a_damaged_module_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    folder = trained_run(zoo, UNTIED, tmp_path, ("norm",))
    tensors = load_file(folder / peft_files.WEIGHTS)
    key = "base_model.model.model.norm.weight"
    base = load_base(zoo(UNTIED), "nf4")
    for damaged in (torch.ones(3), torch.full_like(tensors[key], float("nan"))):
        copy = tmp_path / f"copy{damaged.numel()}"
        copy.mkdir()
        (copy / peft_files.WEIGHTS).write_bytes(peft_files.serialize(tensors | {key: damaged}))
        (copy / peft_files.CONFIG).write_bytes((folder / peft_files.CONFIG).read_bytes())
        with pytest.raises(AdapterError, match=r"norm\.weight is .*needed: \[64\] finite numbers"):
            attach(base.model, peft_files.read(copy), base.manifest.sha256)
        assert not modules_to_save(base.model) and not adapted(base.model)
