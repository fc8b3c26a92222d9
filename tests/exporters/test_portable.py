"""A portable adapter is the adapter, whoever reads it; the table of servers says what each makes of a folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from support.command_line import qlora
from support.small_runs import recipe_of, run, write_rows
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora.adapters import peft_files
from qlora.exporters.server_support import servers

Zoo = Callable[..., Path]
pytestmark = pytest.mark.xdist_group("portable")
FAMILY = "llama-tied-bias"
IDS = torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(0))
PATTERNS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 3},
        "alpha_pattern": {"k_proj": 5, "up_proj": 9},
    },
}
PATTERNS["rslora with patterns"] = PATTERNS["rslora"] | PATTERNS["patterns"]


def plain(zoo: Zoo) -> Any:
    return AutoModelForCausalLM.from_pretrained(zoo(FAMILY), dtype=torch.float32)


def of_peft(zoo: Zoo, folder: Path, options: dict[str, Any]) -> Path:
    """A strong random adapter that PEFT made and wrote."""
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(plain(zoo), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(zoo: Zoo, adapter: Path) -> Tensor:
    return PeftModel.from_pretrained(plain(zoo), adapter).eval()(input_ids=IDS).logits


@pytest.mark.parametrize("kind", PATTERNS)
def test_it_equals_the_original_in_peft_and_nothing_is_left_to_misread(zoo: Zoo, kind: str, tmp_path: Path) -> None:
    source = of_peft(zoo, tmp_path / "source", PATTERNS[kind])
    found = qlora("export", source, tmp_path / "portable", "--to", "portable", "--json")
    assert found.json["agreement"] is None and "vllm serve" in found.err
    config = json.loads((tmp_path / "portable" / peft_files.CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == (8 if "patterns" in kind else 4)
    assert not config["use_rslora"] and config["rank_pattern"] == config["alpha_pattern"] == {}
    assert {tensor.shape[0] for tensor, _ in peft_files.read(tmp_path / "portable").pairs.values()} == {config["r"]}
    before, after = logits(zoo, source), logits(zoo, tmp_path / "portable")
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)  # float32: the scale is multiplied in earlier
    with torch.no_grad():
        assert (plain(zoo)(input_ids=IDS).logits - before).abs().max() > 0.1  # there was something to keep


def test_of_a_run_it_keeps_what_the_run_knows(zoo: Zoo, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 8)
    run(recipe_of(zoo(FAMILY), data, tmp_path / "run", "adapter.kind=rslora", "train.max_steps=2"))
    found = qlora("export", tmp_path / "run", tmp_path / "out", "--to", "portable", "--json").json
    ours, theirs = peft_files.read(tmp_path / "run"), peft_files.read(tmp_path / "out")
    assert ours.base_sha256 == theirs.base_sha256 and ours.config["target_modules"] == theirs.config["target_modules"]
    assert found["bytes"] == (tmp_path / "out" / peft_files.WEIGHTS).stat().st_size
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2 optimizer steps" in card and "More Information Needed" not in card
    assert str(tmp_path) not in card and str(zoo(FAMILY)) not in card
    torch.testing.assert_close(logits(zoo, tmp_path / "out"), logits(zoo, tmp_path / "run"), rtol=0, atol=1e-4)
    again = qlora("eval", tmp_path / "run", "--adapter", tmp_path / "out", "--data", data, "--json").json
    assert again["loss"] == pytest.approx(
        qlora("eval", tmp_path / "run", "--data", data, "--json").json["loss"], rel=1e-5
    )


def accepts(folder: Path, config: dict[str, Any], target: str = "adapter") -> dict[str, bool]:
    folder.mkdir(exist_ok=True)
    (folder / ("config.json" if target in ("merged", "ollama") else peft_files.CONFIG)).write_text(json.dumps(config))
    return {row.name: row.accepts for row in servers(target, folder, "out", "BASE")}


def test_the_table_says_who_would_misread_an_adapter(tmp_path: Path) -> None:
    config = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj"]}
    everyone = {"PEFT": True, "vLLM": True, "SGLang": True, "llama.cpp": True, "Ollama": False}
    assert accepts(tmp_path, config) == everyone
    scaled = everyone | {"SGLang": False, "llama.cpp": False}
    assert accepts(tmp_path, config | {"use_rslora": True}) == scaled
    assert accepts(tmp_path, config | {"alpha_pattern": {"q_proj": 8}}) == scaled | {"vLLM": False}
    assert accepts(tmp_path, config | {"r": 1024}) == everyone | {"vLLM": False}
    for rank, flag in ((16, 16), (17, 32), (200, 256), (64, 64)):
        accepts(tmp_path, config | {"r": rank})
        (row,) = [row for row in servers("adapter", tmp_path, "out", "BASE") if row.name == "vLLM"]
        assert f"--max-lora-rank {flag} " in row.how and "vllm serve BASE" in row.how


def test_the_table_says_who_takes_a_merged_model(tmp_path: Path) -> None:
    llama, qwen3 = ({"architectures": [name]} for name in ("LlamaForCausalLM", "Qwen3ForCausalLM"))
    assert not accepts(tmp_path, llama, "merged")["Ollama"] and accepts(tmp_path, llama, "ollama")["Ollama"]
    assert not accepts(tmp_path, qwen3, "ollama")["Ollama"]
    assert all(accepts(tmp_path, qwen3, "merged")[name] for name in ("transformers", "vLLM", "SGLang", "llama.cpp"))
