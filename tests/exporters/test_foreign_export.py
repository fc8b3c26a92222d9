"""Adapters of other tools through the real commands: evaluated, exported, combined; and what a server needs beside."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.adapted_models import load_plain, logits
from support.command_line import CommandResult, qlora
from support.peft_adapters import change_config, read_dense, save_peft_adapter
from support.small_runs import recipe_of, run, write_records
from support.tiny_models import CHATML, byte_tokenizer
from transformers import AutoTokenizer

from qlora.adapters import peft_files
from qlora.runs.load_run import load_run, load_with_adapters

Zoo = Callable[..., Path]
IDS = torch.randint(5, 290, (2, 24), generator=torch.Generator().manual_seed(0))
UNTIED, TIED = "llama", "llama-tied-bias"
ADAPTERS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "changed base": (UNTIED, {"init_lora_weights": "pissa"}),
    "LoRA on both ends": (TIED, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "more rows": (UNTIED, {"rows": 390}),
    "fewer rows": (TIED, {"rows": 300}),
}


def export(adapter: Path, out: Path, target: str, *options: object) -> CommandResult:
    return qlora("export", adapter, out, "--to", target, "--rows", 0, *options)


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("name", ADAPTERS)
def test_exports_compute_what_peft_computes(zoo: Zoo, name: str, tmp_path: Path) -> None:
    family, config = ADAPTERS[name]
    expected = logits(save_peft_adapter(zoo(family), tmp_path / "adapter", **config), IDS)
    result = export(tmp_path / "adapter", tmp_path / "merged", "merged", "--base", "original", "--dtype", "float32")
    assert result.code == 0, result.err
    torch.testing.assert_close(logits(load_plain(tmp_path / "merged"), IDS), expected, rtol=0, atol=1e-4)
    result = export(tmp_path / "adapter", tmp_path / "copy", "adapter")
    base, rows = load_plain(zoo(family)), config.get("rows")
    if rows:
        base.resize_token_embeddings(rows)
        assert f"resize_token_embeddings({rows})" in result.err
    written = peft.PeftModel.from_pretrained(base, tmp_path / "copy").eval()
    torch.testing.assert_close(logits(written, IDS), expected, rtol=0, atol=1e-4)
    settings = json.loads((tmp_path / "copy" / peft_files.CONFIG).read_text())
    assert settings["init_lora_weights"] in (True, False)
    accepted = "yes" if name == "changed base" else "no "  # servers take no whole weights in an adapter
    assert f"vLLM       {accepted}" in result.err


def test_an_adapter_that_was_not_changed_is_copied_byte_for_byte(zoo: Zoo, tmp_path: Path) -> None:
    save_peft_adapter(zoo(UNTIED), tmp_path / "adapter")
    assert export(tmp_path / "adapter", tmp_path / "copy", "adapter").code == 0
    for name in (peft_files.WEIGHTS, peft_files.CONFIG):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_a_changed_base_does_not_disturb_another_adapter(zoo: Zoo, tmp_path: Path) -> None:
    configs: dict[str, dict[str, Any]] = {"pissa": {"init_lora_weights": "pissa"}, "plain": {"r": 3}}
    trained = {name: save_peft_adapter(zoo(UNTIED), tmp_path / name, **config) for name, config in configs.items()}
    loaded, switch = load_with_adapters(str(zoo(UNTIED)), {name: str(tmp_path / name) for name in configs})
    quantized = {name: logits(read(loaded, tmp_path / name), IDS) for name in configs}
    with switch.per_row(("pissa", "plain")):
        rows = logits(loaded.base.model, IDS)
    torch.testing.assert_close(rows[0], quantized["pissa"][0], rtol=0, atol=1e-4)
    torch.testing.assert_close(rows[1], quantized["plain"][1], rtol=0, atol=1e-4)
    dense = {name: logits(read_dense(zoo(UNTIED), tmp_path / name).model, IDS) for name in configs}
    torch.testing.assert_close(dense["plain"], logits(trained["plain"], IDS), rtol=0, atol=1e-5)


def read(loaded: Any, folder: Path) -> Any:
    """The run's base, loaded again with one adapter."""
    return load_run(loaded.recipe.model.name, str(folder)).base.model


@pytest.mark.sample(of=3)
@pytest.mark.parametrize("command", ["inspect", "resize", "combine"])
def test_commands_without_the_base_refuse_a_changed_base(zoo: Zoo, command: str, tmp_path: Path) -> None:
    save_peft_adapter(zoo(UNTIED), tmp_path / "adapter", init_lora_weights="olora")
    folder, out = tmp_path / "adapter", tmp_path / "out"
    options = {
        "inspect": [folder], "resize": [folder, out, "--rank", 2], "combine": [out, f"a={folder}", f"b={folder}"]
    }  # fmt: skip
    result = qlora(command, *options[command])
    assert result.code == 2 and "its start (olora) changed the base" in result.err and not out.exists()
    assert export(folder, tmp_path / "converted", "adapter").code == 0
    assert qlora("inspect", tmp_path / "converted").code == 0


def test_every_command_reports_unknown_settings(zoo: Zoo, tmp_path: Path) -> None:
    save_peft_adapter(zoo(UNTIED), tmp_path / "adapter")
    folder = change_config(tmp_path / "adapter", use_hyper_lora=True)
    data = write_records(tmp_path / "records.jsonl", 3)
    commands: tuple[tuple[object, ...], ...] = (
        ("eval", folder, "--data", data), ("generate", folder, "hi", "--max-new-tokens", 2), ("inspect", folder),
        ("resize", folder, tmp_path / "small", "--rank", 2),
        ("combine", tmp_path / "sum", f"a={folder}", f"b={folder}"),
        ("export", folder, tmp_path / "merged", "--to", "merged", "--rows", 0),
        ("generate", zoo(UNTIED), "hi", "--max-new-tokens", 2, "--adapter", f"a={folder}", "--adapter", f"b={folder}"),
    )  # fmt: skip
    for command in commands:
        result = qlora(*command)
        assert result.code == 0, result.err
        assert "unknown settings are ignored: use_hyper_lora (true)" in result.err, command


def test_a_sum_of_one_adapter_is_that_adapter(zoo: Zoo, tmp_path: Path) -> None:
    patterns = {"use_rslora": True, "rank_pattern": {"down_proj": 6}, "alpha_pattern": {"q_proj": 20}}
    expected = logits(save_peft_adapter(zoo(UNTIED), tmp_path / "a", **patterns), IDS)
    save_peft_adapter(zoo(UNTIED), tmp_path / "b", r=2)
    assert qlora("combine", tmp_path / "sum", f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}:0").code == 0
    written = peft.PeftModel.from_pretrained(load_plain(zoo(UNTIED)), tmp_path / "sum").eval()
    torch.testing.assert_close(logits(written, IDS), expected, rtol=0, atol=2e-5)


def test_the_tokenizer_saved_with_an_adapter_is_used_and_exported(zoo: Zoo, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_peft_adapter(zoo(UNTIED), folder, rows=390)
    assert load_run(str(folder)).tokenizer_folder is None
    tokenizer = byte_tokenizer(CHATML.replace("<|im_end|>", "<|end|>"))
    tokenizer.add_tokens([f"<filler{number}>" for number in range(384 - len(tokenizer))])
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(folder)
    lines: list[str] = []
    loaded = load_run(str(folder), log=lines.append)
    assert f"{folder}: its tokenizer is used: other tokens and chat template and end token than the base's" in lines
    assert loaded.encoder.template.text == tokenizer.chat_template and 384 in loaded.base.stop_token_ids
    assert export(folder, tmp_path / "merged", "merged").code == 0
    written = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert written.chat_template == tokenizer.chat_template and written.eos_token == "<|end|>"
    assert 384 in json.loads((tmp_path / "merged/generation_config.json").read_text())["eos_token_id"]
    assert load_plain(tmp_path / "merged").get_input_embeddings().weight.shape[0] == 390


def test_an_export_has_the_template_and_the_end_token_of_training(zoo: Zoo, tmp_path: Path) -> None:
    base = Path(shutil.copytree(zoo(UNTIED), tmp_path / "base"))
    tokenizer = byte_tokenizer(None)
    tokenizer.eos_token = "</s>"
    shutil.rmtree(base / "additional_chat_templates", ignore_errors=True)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(base)
    (tmp_path / "chatml.jinja").write_text(CHATML)
    data = write_records(tmp_path / "records.jsonl", 6)
    template = f"model.chat_template={tmp_path / 'chatml.jinja'}"
    run(recipe_of(base, data, tmp_path / "run", "train.max_steps=1", template))
    assert load_run(str(tmp_path / "run")).base.stop_token_ids == (2, 4)  # of config.json, and <|im_end|>
    for target in ("merged", "adapter"):
        assert export(tmp_path / "run", tmp_path / target, target).code == 0
        assert AutoTokenizer.from_pretrained(tmp_path / target).chat_template == CHATML
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 4]


def test_an_exported_adapter_with_new_tokens_is_read_without_its_recipe(zoo: Zoo, tmp_path: Path) -> None:
    data = write_records(tmp_path / "records.jsonl", 6)
    tokens = {"new_tokens": [f"<new{number}>" for number in range(126)], "targets": ["q_proj"]}
    run(recipe_of(zoo(UNTIED), data, tmp_path / "run", "train.max_steps=1", adapter=tokens))
    trained = load_run(str(tmp_path / "run"))
    assert export(tmp_path / "run", tmp_path / "adapter", "adapter").code == 0
    exported = load_run(str(tmp_path / "adapter"))
    ids = torch.randint(5, 387, (2, 24), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(exported.base.model, ids), logits(trained.base.model, ids))
    assert exported.base.tokenizer.convert_tokens_to_ids("<new125>") == 386


def test_a_folder_that_is_no_adapter_names_what_is_meant(zoo: Zoo, tmp_path: Path) -> None:
    folder, trainer, mlx = tmp_path / "adapter", tmp_path / "trainer", tmp_path / "mlx"
    save_peft_adapter(zoo(UNTIED), folder)
    for number in (4, 12):
        shutil.copytree(folder, trainer / f"checkpoint-{number}")
    mlx.mkdir()
    for name in ("adapter_config.json", "adapters.safetensors"):
        (mlx / name).write_text("{}")
    below = f"Found adapters below it: {trainer}/checkpoint-4, {trainer}/checkpoint-12. Name one of them."
    cases: tuple[tuple[str, tuple[object, ...]], ...] = (
        (below, ("eval", trainer)), (below, ("inspect", trainer)), (below, ("eval", zoo(UNTIED), "--adapter", trainer)),
        (f"Name its folder: {folder}", ("eval", folder / "adapter_model.safetensors")),
        (f"Name its folder: {folder}", ("inspect", folder / "adapter_model.safetensors")),
        ("an adapter of MLX", ("inspect", mlx)), ("an adapter of MLX", ("eval", zoo(UNTIED), "--adapter", mlx)),
    )  # fmt: skip
    for message, command in cases:
        result = qlora(*command)
        assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result.err
