"""Trainable tokens: gradients equal autograd's, PEFT reads the rows, they are merged, and new tokens are added."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.adapted_models import build_adapter, identity_of, load_base
from support.adapted_models import load_plain as load_plain_model
from support.adapted_models import logits as logits_of
from support.command_line import qlora
from support.small_runs import adapter_tensors, differing_tensors, metrics, recipe_of, run, write_records
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer

from qlora.adapters import peft_files
from qlora.adapters.attach import attach
from qlora.adapters.inject import count, inject
from qlora.adapters.modules_to_save import add_modules_to_save
from qlora.adapters.switch import disable_adapters
from qlora.adapters.trainable_tokens import token_ids, token_rows, train_token_rows
from qlora.errors import AdapterError
from qlora.recipe.planning import Machine, Planner
from qlora.runs.load_run import load_run
from qlora.training.loss import TokenLoss

Zoo = Callable[..., Path]
FAMILIES = ("llama", "llama-tied-bias", "gemma3", "gemma2", "gpt_neox")
TOKENS = [7, 3, 200]
IDS = torch.tensor([[3, 9, 200, 41, 7, 7, 5, 99, 3, 0, 21, 200], [8, 200, 5, 6, 3, 2, 1, 17, 60, 61, 7, 3]])
POSITIONS = torch.arange(IDS.shape[1])[None].expand(2, -1)


def load_plain(folder: Path) -> Any:
    return load_plain_model(folder, attn_implementation="eager")


def logits(model: Any) -> Tensor:
    return logits_of(model, IDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_at_the_base_with_autograds_gradients(zoo: Zoo, family: str) -> None:
    base = load_base(zoo(family), "dense")
    before = logits(base.model)
    train_token_rows(base.model, sorted(TOKENS))
    torch.testing.assert_close(logits(base.model), before, rtol=0, atol=1e-5)  # the head's rows in another product
    TokenLoss(base.model).train()(IDS, IDS, POSITIONS).backward()
    plain = load_plain(zoo(family)).train()
    out = plain(input_ids=IDS).logits
    F.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").backward()
    modules = token_rows(base.model)
    assert len(modules) == (1 if plain.config.tie_word_embeddings else 2)
    for path, module in modules.items():
        expected = plain.get_submodule(path).weight.grad[sorted(TOKENS)]
        assert module.rows.dtype == torch.float32 and module.rows.grad is not None
        torch.testing.assert_close(module.rows.grad, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert {name for name, value in base.model.named_parameters() if value.requires_grad} == {
        f"{path}.master.rows" for path in modules
    }
    with disable_adapters(base.model):
        assert torch.equal(logits(base.model), before)


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_and_the_merged_model_give_the_runs_logits(zoo: Zoo, family: str, tmp_path: Path) -> None:
    data = write_records(tmp_path / "records.jsonl", 12)
    options = ("train.max_steps=3", "optim.learning_rate=0.02", "data.eval_fraction=0.25", "quant.kind=dense")
    run(recipe_of(zoo(family), data, tmp_path / "run", *options, adapter={"tokens": ["<|im_start|>", 7, 100]}))
    loaded = load_run(str(tmp_path / "run"))
    expected = logits(loaded.base.model)
    with torch.no_grad():
        for module in token_rows(loaded.base.model).values():
            assert (module.rows - module.weight[module.index]).abs().max() > 1e-3
    peft_model = peft.PeftModel.from_pretrained(load_plain(zoo(family)), tmp_path / "run").eval()
    torch.testing.assert_close(logits(peft_model), expected, rtol=0, atol=1e-4)
    agreement = qlora("export", tmp_path / "run", tmp_path / "merged", "--to", "merged", "--json").json["agreement"]
    assert agreement["top1"] == 1.0 and agreement["max_logit_difference"] <= 1e-4
    torch.testing.assert_close(logits(load_plain(tmp_path / "merged")), expected, rtol=0, atol=1e-4)
    refused = qlora("export", tmp_path / "run", tmp_path / "portable", "--to", "portable")
    assert refused.code == 2 and "rows of" in refused.err
    assert "use --to merged" in qlora("export", tmp_path / "run", tmp_path / "a", "--to", "adapter").err


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias"])
def test_rows_are_read_in_the_order_in_which_peft_wrote_them(zoo: Zoo, family: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj"], trainable_token_indices=TOKENS, task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    peft_model = peft.get_peft_model(load_plain(zoo(family)), config).eval()
    with torch.no_grad():
        for name, value in peft_model.named_parameters():
            if "trainable_tokens_delta" in name:
                value.add_(torch.randn(value.shape) * 0.3)
    peft_model.save_pretrained(tmp_path)
    base = load_base(zoo(family), "dense")
    attach(base.model, peft_files.read(tmp_path), base.manifest.sha256)
    torch.testing.assert_close(logits(base.model), logits(peft_model), rtol=0, atol=1e-4)
    assert (logits(load_plain(zoo(family))) - logits(peft_model)).abs().max() > 0.1


def test_a_resumed_run_equals_an_uninterrupted_one(zoo: Zoo, tmp_path: Path) -> None:
    data = write_records(tmp_path / "records.jsonl", 8)

    def train(output: str, steps: int) -> None:
        options = ("train.save_every=2", f"train.max_steps={steps}")
        run(recipe_of(zoo("llama"), data, tmp_path / output, *options, adapter={"tokens": ["<|im_end|>", 7]}))

    train("uninterrupted", 3)
    train("resumed", 2)
    train("resumed", 3)
    assert differing_tensors(tmp_path / "uninterrupted", tmp_path / "resumed") == []
    assert metrics(tmp_path / "uninterrupted") == metrics(tmp_path / "resumed")
    names = adapter_tensors(tmp_path / "resumed")
    assert len([name for name in names if "trainable_tokens_delta" in name]) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_counts_token_rows(zoo: Zoo, family: str, tmp_path: Path) -> None:
    base = load_base(zoo(family), "nf4", "bfloat16")
    inject(base.model, build_adapter(rank=4), "all-linear", 0)
    train_token_rows(base.model, [1, 2])
    recipe = recipe_of(zoo(family), tmp_path / "none", tmp_path / "run", adapter={"tokens": [1, 2]})
    plan = Planner(recipe).plan(Machine.described("24GiB")).as_json()
    assert plan["trainable_parameters"] == count(base.model).trainable_parameters
    assert logits(base.model).dtype == torch.bfloat16


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("new_tokens", [2, 130], ids=["spare rows", "a longer matrix"])
@pytest.mark.parametrize("family", ["llama", "llama-tied-bias"])
def test_new_tokens_are_trained_written_merged_and_read_by_peft(
    zoo: Zoo, family: str, new_tokens: int, tmp_path: Path
) -> None:
    texts = [f"<new{number}>" for number in range(new_tokens)]
    data = tmp_path / "records.jsonl"
    records = (
        {"prompt": f"say {texts[n % new_tokens]}", "completion": f"{texts[(n + 1) % new_tokens]} yes {n}"}
        for n in range(12)
    )
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ("train.max_steps=3", "optim.learning_rate=0.02", "data.eval_fraction=0.25", "quant.kind=dense")
    section = {"new_tokens": texts, "tokens": [7]}
    recipe = recipe_of(zoo(family), data, tmp_path / "run", *options, adapter=section)
    assert run(recipe)["data"]["kept"] == 12
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    ids = tokenizer.convert_tokens_to_ids(texts)
    assert ids == list(range(261, 261 + new_tokens)) and tokenizer("say <new1>!")["input_ids"].count(ids[1]) == 1
    loaded = load_run(str(tmp_path / "run"))
    rows = max(384, 261 + new_tokens)
    assert loaded.encoder.vocab_size == 261 + new_tokens
    assert len(loaded.base.model.get_input_embeddings().weight) == rows
    prompt = torch.tensor([[1, 7, ids[0], 9, ids[-1], 30, ids[1], 12]])
    expected = logits_of(loaded.base.model, prompt)
    base = load_plain(zoo(family))
    if rows > 384:
        base.resize_token_embeddings(rows)
    peft_model = peft.PeftModel.from_pretrained(base, tmp_path / "run").eval()
    torch.testing.assert_close(logits_of(peft_model, prompt), expected, rtol=0, atol=1e-4)
    agreement = qlora("export", tmp_path / "run", tmp_path / "merged", "--to", "merged", "--json").json["agreement"]
    assert agreement["top1"] == 1.0 and agreement["max_logit_difference"] <= 1e-4
    merged = load_plain(tmp_path / "merged")
    assert merged.config.vocab_size == rows == len(merged.get_input_embeddings().weight)
    torch.testing.assert_close(logits_of(merged, prompt), expected, rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids(texts) == ids
    plan = Planner(recipe).plan(Machine.described("24GiB")).as_json()
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert plan["trainable_parameters"] == manifest["adapter"]["trainable_parameters"]


def test_a_run_with_new_tokens_resumes_exactly(zoo: Zoo, tmp_path: Path) -> None:
    data = write_records(tmp_path / "records.jsonl", 8)
    texts = [f"<new{number}>" for number in range(130)]

    def train(output: str, steps: int) -> None:
        options = ("train.save_every=2", f"train.max_steps={steps}")
        run(recipe_of(zoo("llama"), data, tmp_path / output, *options, adapter={"new_tokens": texts}))

    train("uninterrupted", 3)
    train("resumed", 2)
    train("resumed", 3)
    assert differing_tensors(tmp_path / "uninterrupted", tmp_path / "resumed") == []
    assert qlora("eval", tmp_path / "uninterrupted" / "checkpoint-000002", "--data", data).code == 0


def test_a_new_token_that_exists_already_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    data = write_records(tmp_path / "records.jsonl", 8)
    for texts, message in (
        (["<pad>"], "'<pad>' is a token of this base already"),
        (["<a>", "<a>"], "'<a>' is listed twice"),
    ):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"model: {zoo('llama')}\ndata: {{train: {data}, max_length: 96}}\n"
            f"adapter: {{new_tokens: {json.dumps(texts)}}}\ntrain: {{output: {tmp_path / 'run'}}}\n"
        )
        for command in ("check", "train"):
            refused = qlora(command, recipe)
            assert refused.code == 2 and f"adapter.new_tokens: {message}" in refused.out + refused.err


def test_an_invalid_token_is_refused_with_the_key(zoo: Zoo, tmp_path: Path) -> None:
    base = load_base(zoo("llama"), "dense")
    assert token_ids(base.tokenizer, [9, "<pad>", 3], 384) == [0, 3, 9]
    for tokens, message in (
        (["<new>"], "'<new>' is not a token"),
        ([384], "384 is not a token"),
        ([3, 3], "3 occurs twice"),
    ):
        with pytest.raises(AdapterError, match=f"adapter.tokens: {message}"):
            token_ids(base.tokenizer, tokens, 384)
    add_modules_to_save(base.model, ["embed_tokens"])
    with pytest.raises(AdapterError, match=r"adapter\.save_modules trains the whole matrix"):
        train_token_rows(base.model, [3])
    other, adapter = load_base(zoo("llama"), "dense"), build_adapter(rank=2)
    inject(other.model, adapter, ["q_proj"], 0)
    train_token_rows(other.model, [3, 5])
    peft_files.write(tmp_path, other.model, adapter, identity_of(other))
    path = tmp_path / peft_files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": [3, 999]}))
    fresh = load_base(zoo("llama"), "dense")
    with pytest.raises(AdapterError, match="different ids below 384"):
        attach(fresh.model, peft_files.read(tmp_path), fresh.manifest.sha256)
