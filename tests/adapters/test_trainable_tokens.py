"""Rows of embedding and head that train by themselves: as autograd says, in PEFT's file, merged, and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.command_line import qlora
from support.small_runs import adapter_tensors, metrics, recipe_of, run, write_rows
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.adapters import peft_files
from qlora.adapters.inject import count, inject
from qlora.adapters.lora import Lora
from qlora.adapters.modules_to_save import save
from qlora.adapters.switch import adapters_off
from qlora.adapters.trainable_tokens import ids_of, row_modules, train_rows
from qlora.errors import AdapterError
from qlora.model import Model
from qlora.model.load_base import Base, load
from qlora.quant import QUANTIZERS
from qlora.recipe.planning import elsewhere, plan_of
from qlora.runs.load_run import load_run
from qlora.training.loss import TokenLoss

Zoo = Callable[..., Path]
pytestmark = pytest.mark.xdist_group("tokens")
FAMILIES = ("llama", "llama-tied-bias", "gemma3", "gemma2", "gpt_neox")
TOKENS = [7, 3, 200]
IDS = torch.tensor([[3, 9, 200, 41, 7, 7, 5, 99, 3, 0, 21, 200], [8, 200, 5, 6, 3, 2, 1, 17, 60, 61, 7, 3]])
POSITIONS = torch.arange(IDS.shape[1])[None].expand(2, -1)


def base_of(folder: Path, quantizer: str = "dense", dtype: str = "float32") -> Base:
    return load(Model(name=str(folder), dtype=dtype), QUANTIZERS[quantizer](), torch.device("cpu"))


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_at_the_base_and_the_gradients_are_the_rows_of_the_whole(zoo: Zoo, family: str) -> None:
    base = base_of(zoo(family))
    before = logits(base.model)
    train_rows(base.model, sorted(TOKENS))
    torch.testing.assert_close(logits(base.model), before, rtol=0, atol=1e-5)  # the head's rows in another product
    TokenLoss(base.model).train()(IDS, IDS, POSITIONS).backward()
    theirs = plain(zoo(family)).train()
    out = theirs(input_ids=IDS).logits
    F.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").backward()
    found = row_modules(base.model)
    assert len(found) == (1 if theirs.config.tie_word_embeddings else 2)
    for path, rows in found.items():
        wanted = theirs.get_submodule(path).weight.grad[sorted(TOKENS)]
        assert rows.rows.dtype == torch.float32 and rows.rows.grad is not None
        torch.testing.assert_close(rows.rows.grad, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert {name for name, value in base.model.named_parameters() if value.requires_grad} == {
        f"{path}.master.rows" for path in found
    }
    with adapters_off(base.model):
        assert torch.equal(logits(base.model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_the_run_and_so_does_the_merged_model(zoo: Zoo, family: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 12)
    shown = ("train.max_steps=3", "optim.learning_rate=0.02", "data.eval_fraction=0.25", "quant.kind=dense")
    run(recipe_of(zoo(family), data, tmp_path / "run", *shown, adapter={"tokens": ["<|im_start|>", 7, 100]}))
    opened = load_run(str(tmp_path / "run"))
    ours = logits(opened.base.model)
    with torch.no_grad():
        moved = [(each.rows - each.weight[each.index]).abs().max() for each in row_modules(opened.base.model).values()]
    assert min(moved) > 1e-3
    theirs = peft.PeftModel.from_pretrained(plain(zoo(family)), tmp_path / "run").eval()
    torch.testing.assert_close(logits(theirs), ours, rtol=0, atol=1e-4)
    found = qlora("export", tmp_path / "run", tmp_path / "merged", "--to", "merged", "--json").json
    assert found["agreement"]["top1"] == 1.0 and found["agreement"]["max_logit_difference"] <= 1e-4
    torch.testing.assert_close(logits(plain(tmp_path / "merged")), ours, rtol=0, atol=1e-4)
    said = qlora("export", tmp_path / "run", tmp_path / "portable", "--to", "portable")
    assert said.code == 2 and "rows of" in said.err
    assert "use --to merged" in qlora("export", tmp_path / "run", tmp_path / "a", "--to", "adapter").err


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias"])
def test_we_read_what_peft_wrote_in_its_own_order(zoo: Zoo, family: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj"], trainable_token_indices=TOKENS, task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = peft.get_peft_model(plain(zoo(family)), config).eval()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if "trainable_tokens_delta" in name:
                value.add_(torch.randn(value.shape) * 0.3)
    theirs.save_pretrained(tmp_path)
    base = base_of(zoo(family))
    peft_files.attach(base.model, peft_files.read(tmp_path), base.manifest.sha256)
    torch.testing.assert_close(logits(base.model), logits(theirs), rtol=0, atol=1e-4)
    assert (logits(plain(zoo(family))) - logits(theirs)).abs().max() > 0.1


def test_a_resumed_run_is_the_one_that_was_never_stopped(zoo: Zoo, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 8)

    def recipe(output: str, *overrides: str) -> Any:
        options = ("train.save_every=2", *overrides)
        return recipe_of(zoo("llama"), data, tmp_path / output, *options, adapter={"tokens": ["<|im_end|>", 7]})

    run(recipe("whole"))
    run(recipe("parts", "train.max_steps=2"))
    run(recipe("parts"))
    whole, parts = (adapter_tensors(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert len([name for name in whole if "trainable_tokens_delta" in name]) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_counts_them(zoo: Zoo, family: str, tmp_path: Path) -> None:
    base = base_of(zoo(family), "nf4", "bfloat16")
    inject(base.model, Lora(4, 8.0), "all-linear", 0)
    train_rows(base.model, [1, 2])
    recipe = recipe_of(zoo(family), tmp_path / "none", tmp_path / "run", adapter={"tokens": [1, 2]})
    planned = plan_of(recipe, elsewhere("24GiB", 1, None)).as_json()
    assert planned["trainable_parameters"] == count(base.model).trainable_parameters
    assert logits(base.model).dtype == torch.bfloat16


@pytest.mark.parametrize("many", [2, 130], ids=["spare rows", "a longer matrix"])
@pytest.mark.parametrize("family", ["llama", "llama-tied-bias"])
def test_new_tokens_are_learnt_written_merged_and_read_by_peft(
    zoo: Zoo, family: str, many: int, tmp_path: Path
) -> None:
    new = [f"<new{number}>" for number in range(many)]
    data = tmp_path / "rows.jsonl"
    lines = ({"prompt": f"say {new[n % many]}", "completion": f"{new[(n + 1) % many]} yes {n}"} for n in range(12))
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = ("train.max_steps=3", "optim.learning_rate=0.02", "data.eval_fraction=0.25", "quant.kind=dense")
    recipe = recipe_of(zoo(family), data, tmp_path / "run", *shown, adapter={"new_tokens": new, "tokens": [7]})
    assert run(recipe)["data"]["kept"] == 12
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    ids = tokenizer.convert_tokens_to_ids(new)
    assert ids == list(range(261, 261 + many)) and tokenizer("say <new1>!")["input_ids"].count(ids[1]) == 1
    opened = load_run(str(tmp_path / "run"))
    rows = max(384, 261 + many)
    assert opened.encoder.vocabulary == 261 + many and len(opened.base.model.get_input_embeddings().weight) == rows
    prompt = torch.tensor([[1, 7, ids[0], 9, ids[-1], 30, ids[1], 12]])

    @torch.no_grad()
    def answers(model: Any) -> Tensor:
        return model(input_ids=prompt).logits

    ours = answers(opened.base.model)
    base = plain(zoo(family))
    if rows > 384:
        base.resize_token_embeddings(rows)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run").eval()
    torch.testing.assert_close(answers(theirs), ours, rtol=0, atol=1e-4)
    found = qlora("export", tmp_path / "run", tmp_path / "merged", "--to", "merged", "--json").json
    assert found["agreement"]["top1"] == 1.0 and found["agreement"]["max_logit_difference"] <= 1e-4
    merged = plain(tmp_path / "merged")
    assert merged.config.vocab_size == rows == len(merged.get_input_embeddings().weight)
    torch.testing.assert_close(answers(merged), ours, rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids(new) == ids
    planned = plan_of(recipe, elsewhere("24GiB", 1, None)).as_json()
    trained = json.loads((tmp_path / "run" / "run.json").read_text())["adapter"]["trainable_parameters"]
    assert planned["trainable_parameters"] == trained


def test_a_run_with_new_tokens_goes_on_exactly(zoo: Zoo, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 8)
    new = [f"<new{number}>" for number in range(130)]

    def recipe(output: str, *overrides: str) -> Any:
        options = ("train.save_every=2", *overrides)
        return recipe_of(zoo("llama"), data, tmp_path / output, *options, adapter={"new_tokens": new})

    run(recipe("whole"))
    run(recipe("parts", "train.max_steps=2"))
    run(recipe("parts"))
    whole, parts = (adapter_tensors(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert qlora("eval", tmp_path / "whole" / "checkpoint-000002", "--data", data).code == 0


def test_a_new_token_that_is_there_already_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 8)
    for words, told in (
        (["<pad>"], "'<pad>' is a token of this base already"),
        (["<a>", "<a>"], "'<a>' is there twice"),
    ):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"model: {zoo('llama')}\ndata: {{train: {data}, max_length: 96}}\n"
            f"adapter: {{new_tokens: {json.dumps(words)}}}\ntrain: {{output: {tmp_path / 'run'}}}\n"
        )
        for verb in ("check", "train"):
            said = qlora(verb, recipe)
            assert said.code == 2 and f"adapter.new_tokens: {told}" in said.out + said.err


def test_what_is_no_token_is_refused_with_the_key(zoo: Zoo, tmp_path: Path) -> None:
    base = base_of(zoo("llama"))
    assert ids_of(base.tokenizer, [9, "<pad>", 3], 384) == [0, 3, 9]
    for wrong, told in ((["<new>"], "'<new>' is no token"), ([384], "384 is no token"), ([3, 3], "3 is there twice")):
        with pytest.raises(AdapterError, match=f"adapter.tokens: {told}"):
            ids_of(base.tokenizer, wrong, 384)
    save(base.model, ["embed_tokens"])
    with pytest.raises(AdapterError, match=r"adapter\.save_modules trains the whole matrix"):
        train_rows(base.model, [3])
    config = {"trainable_token_indices": [3, 999]}
    other = base_of(zoo("llama"))
    inject(other.model, Lora(2, 4.0), ["q_proj"], 0)
    train_rows(other.model, [3, 5])
    peft_files.write(tmp_path, other.model, Lora(2, 4.0), peft_files.Identity("x", None, other.manifest.sha256))
    path = tmp_path / peft_files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    fresh = base_of(zoo("llama"))
    with pytest.raises(AdapterError, match="different ids below 384"):
        peft_files.attach(fresh.model, peft_files.read(tmp_path), fresh.manifest.sha256)
