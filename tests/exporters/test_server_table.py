"""The table of servers: what loads an export, by rules of stated versions, and commands that work for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command_line import qlora
from support.tiny_models import FAMILIES

from qlora.adapters.peft_files import CONFIG, WEIGHTS
from qlora.exporters.adapter_servers import ServedBase
from qlora.exporters.model_servers import servers
from qlora.exporters.server_support import VERSIONS, Server, mlx_problem
from qlora.runs.report.model_card import Loading, model_card

Zoo = Callable[..., Path]
PLAIN = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj"]}
NO_TENSORS = (2).to_bytes(8, "little") + b"{}"


def table(
    folder: Path, base: Path, config: dict[str, Any], target: str = "adapter", **options: Any
) -> dict[str, Server]:
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / WEIGHTS).write_bytes(NO_TENSORS)
    served = ServedBase(options.pop("name", "BASE"), base, Loading(**options))
    return {server.name: server for server in servers("adapter", folder, "out", served)}


def loads(*arguments: Any) -> dict[str, bool]:
    return {name: server.loads for name, server in table(*arguments).items()}


def test_adapters_that_a_server_would_misread_are_marked(zoo: Zoo, tmp_path: Path) -> None:
    base = zoo("llama")
    plain = {"PEFT": True, "vLLM": True, "SGLang": True, "llama.cpp": True, "Ollama": False, "mlx-lm": False}
    assert loads(tmp_path, base, PLAIN) == plain
    rescaled = plain | {"SGLang": False, "llama.cpp": False}  # vLLM 0.32 reads rsLoRA and patterns
    assert loads(tmp_path, base, PLAIN | {"use_rslora": True}) == rescaled
    assert loads(tmp_path, base, PLAIN | {"alpha_pattern": {"q_proj": 8}}) == rescaled
    assert loads(tmp_path, base, PLAIN | {"r": 1024}) == plain | {"vLLM": False}
    only_peft = dict.fromkeys(plain, False) | {"PEFT": True}
    for field in ({"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_parameters": ["experts.down_proj"]}):
        assert loads(tmp_path, base, PLAIN | field) == only_peft


@pytest.mark.parametrize("rank, allowed", [(16, 16), (17, 32), (200, 256), (64, 64)])
def test_the_command_of_vllm_allows_the_rank(zoo: Zoo, rank: int, allowed: int, tmp_path: Path) -> None:
    vllm = table(tmp_path, zoo("llama"), PLAIN | {"r": 4, "rank_pattern": {"q_proj": rank}})["vLLM"]
    assert vllm.command == f"vllm serve BASE --enable-lora --max-lora-rank {allowed} --lora-modules mine=out"


def test_a_base_of_the_hub_is_named_by_its_id(zoo: Zoo, tmp_path: Path) -> None:
    local, hub = (table(tmp_path, zoo("llama"), PLAIN, name=name)["llama.cpp"] for name in ("BASE", "Qwen/Qwen3-0.6B"))
    assert "--base BASE out" in local.command and "--base-model-id Qwen/Qwen3-0.6B out" in hub.command


def test_peft_gets_the_rows_of_new_tokens_and_the_class_of_a_wrapper(zoo: Zoo, tmp_path: Path) -> None:
    options = {"rows": 386, "factory": "AutoModelForImageTextToText"}
    peft = table(tmp_path, zoo("llama"), PLAIN | {"trainable_token_indices": [385]}, **options)["PEFT"]
    assert "base.resize_token_embeddings(386); model = PeftModel" in peft.command and "0.15" in peft.why
    assert peft.command.startswith('base = AutoModelForImageTextToText.from_pretrained("BASE")')


def model_table(folder: Path, config: dict[str, Any], target: str = "merged") -> dict[str, Server]:
    (folder / "config.json").write_text(json.dumps(config))
    return {server.name: server for server in servers(target, folder, "out", ServedBase("BASE", folder))}


def test_a_class_that_a_server_lacks_is_named_with_its_version(tmp_path: Path) -> None:
    merged = model_table(tmp_path, {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"})
    assert {name for name, server in merged.items() if server.loads} == {"transformers", "vLLM", "SGLang", "mlx-lm"}
    versions = {name: entry["version"] for name, entry in json.loads(VERSIONS.read_text()).items()}
    assert all(f"{name} {version}" in merged[name].why for name, version in versions.items())
    unknown = model_table(tmp_path, {"architectures": ["NovelForCausalLM"], "model_type": "novel"})
    assert unknown["vLLM"].why == f"vLLM {versions['vLLM']} has no NovelForCausalLM" and not unknown["SGLang"].loads
    assert "use --to ollama" in merged["Ollama"].why and "use --to gguf" in merged["llama.cpp"].why


def test_a_gguf_file_and_a_modelfile_have_their_own_rows(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert not model_table(tmp_path, {}, "gguf")["Ollama"].loads
    (tmp_path / "Modelfile").touch()
    rows = model_table(tmp_path, {}, "ollama")
    assert rows["Ollama"].command == "ollama create mine -f out/Modelfile"
    assert rows["llama.cpp"].command == "llama-server -m out/model.gguf"


@pytest.mark.parametrize("family, settings, words", [
    ("mistral", {}, "no sliding window for mistral"), ("mistral", {"sliding_window": None}, None),
    ("gemma2", {}, "no sliding window"), ("gemma3", {}, "others"), ("qwen3", {}, None), ("gpt_neox", {}, "gpt_neox"),
])  # fmt: skip
def test_what_mlx_lm_computes_otherwise(family: str, settings: dict[str, Any], words: str | None) -> None:
    problem = mlx_problem(FAMILIES[family]().to_dict() | settings)
    assert (problem is None) if words is None else (problem is not None and words in problem)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_readme_of_a_run_prints_no_command_of_a_server(kind: str) -> None:
    readme = model_card({"adapter": {"kind": kind}, "base": {"name": "a/b"}}, "", Loading(rows=9))
    assert "vllm serve" not in readme and "base.resize_token_embeddings(9)" in readme and "--to portable" in readme


def test_the_readme_of_an_export_prints_only_commands_that_work(zoo: Zoo, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_dora(zoo, source)
    qlora("export", source, tmp_path / "adapter", "--to", "adapter", "--json")
    readme = (tmp_path / "adapter" / "README.md").read_text()
    assert "vllm serve" not in readme and "convert_lora_to_gguf" not in readme and "PeftModel.from_pretrained" in readme
    answer = qlora("export", source, tmp_path / "mlx", "--to", "mlx", "--json").json
    rows = {row["name"]: row for row in answer["servers"]}
    assert {*rows["mlx-lm"]} == {"name", "loads", "why", "command"} and rows["mlx-lm"]["loads"]


def write_dora(zoo: Zoo, folder: Path) -> None:
    from support.adapted_models import identity_of, inject_trained, load_base

    from qlora.adapters import peft_files

    folder.mkdir()
    loaded = load_base(zoo("llama"), "dense")
    peft_files.write(folder, loaded.model, inject_trained(loaded, "dora"), identity_of(loaded))
