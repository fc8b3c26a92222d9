"""Random models of eight architectures and the demo base, trained and exported, with answers to compare with."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import models as zoo

from qlora.exporters import ExportRequest
from qlora.exporters.export_run import export_run
from qlora.model.config_dialects import in_both_dialects
from qlora.runs.load_run import load_run
from support.command_line import qlora
from support.paths import ROOT
from support.small_runs import recipe_of, run

DEMO = ROOT / "qlora" / "demo"
TOKENS = 40  # of an answer, at most
COMMON: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 2,
    "pad_token_id": 3,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
NO_HEAD_DIM = {name: value for name, value in COMMON.items() if name != "head_dim"}
GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 512}
WINDOW = {"sliding_window": 48}
ARCHITECTURES: Mapping[str, Callable[[], Any]] = {
    "llama3": lambda: zoo.llama.LlamaConfig(**COMMON, rope_parameters=LLAMA3_ROPE),
    "mistral": lambda: zoo.mistral.MistralConfig(**COMMON, sliding_window=None),
    "qwen2": lambda: zoo.qwen2.Qwen2Config(**NO_HEAD_DIM),
    "qwen3": lambda: zoo.qwen3.Qwen3Config(**COMMON),
    "gemma2": lambda: zoo.gemma2.Gemma2Config(**COMMON, **GEMMA),
    "gemma3": lambda: zoo.gemma3.Gemma3TextConfig(
        **COMMON | {"num_hidden_layers": 6}, **GEMMA | {"sliding_window": 48}
    ),
    "phi3": lambda: zoo.phi3.Phi3Config(**NO_HEAD_DIM),
    "granite": lambda: zoo.granite.GraniteConfig(**NO_HEAD_DIM, logits_scaling=2.0),
}
ADAPTERS = {"llama3": ("adapter.kind=rslora",), "qwen3": ("adapter.kind=dora",), "mistral": (
    "adapter.rank_pattern={q_proj: 8, down_proj: 2}", "adapter.alpha_pattern={k_proj: 5}",
)}  # fmt: skip
NAMES = ("demo", *ARCHITECTURES)
EXPERTS = {"num_experts_per_tok": 2, "num_hidden_layers": 2}
YARN = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 64, "truncate": True,
}  # fmt: skip
LLAMA_CPP: Mapping[str, Callable[[], Any]] = {  # compared in llama.cpp only
    "smollm3": lambda: zoo.smollm3.SmolLM3Config(**NO_HEAD_DIM | {"num_hidden_layers": 4}),
    "qwen3_moe": lambda: zoo.qwen3_moe.Qwen3MoeConfig(
        **COMMON | EXPERTS, num_experts=4, moe_intermediate_size=64, norm_topk_prob=True
    ),
    "gpt_oss": lambda: zoo.gpt_oss.GptOssConfig(
        **COMMON | EXPERTS, num_local_experts=4, sliding_window=48, rope_parameters=YARN
    ),
}


def save_base(folder: Path, name: str, seed: int = 0) -> Path:
    """The demo base in float32, or a random model with the demo's tokenizer."""
    shutil.copytree(DEMO / "base", folder)
    if name == "demo":
        config = json.loads((folder / "config.json").read_text())
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.save_pretrained(folder)
        assert config["architectures"] == ["LlamaForCausalLM"]
        return with_both_dialects(folder)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config({**ARCHITECTURES, **LLAMA_CPP}[name](), dtype=torch.float32)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" not in path:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    return with_both_dialects(folder)


def with_both_dialects(folder: Path) -> Path:
    """The base as most are on the hub: rope settings under the names that every reader knows."""
    path = folder / "config.json"
    config = AutoConfig.from_pretrained(folder)
    path.write_text(json.dumps(in_both_dialects(json.loads(path.read_text()), config)))
    return folder


def conversations() -> list[list[dict[str, str]]]:
    """Eight prompts of 1, 2 and 4 turns (questions), from the demo's held-out records."""
    lines = (DEMO / "data" / "eval.jsonl").read_text().splitlines()
    turns = [json.loads(line)["messages"] for line in lines]
    prompts, start = [], 0
    for questions in (1, 2, 4, 1, 2, 4, 1, 1):
        used = turns[start : start + questions]
        prompts.append([turn for pair in used for turn in pair][:-1])
        start += questions
    return prompts


def build(folder: Path, name: str, targets: tuple[str, ...] = ("merged", "portable", "adapter", "mlx")) -> Path:
    """A base, a run and its exports below `folder`, and reference.json: prompt ids and greedy answers of the run."""
    if (folder / "reference.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = save_base(folder / "base", name)
    steps = ("train.max_steps=8", "train.micro_batch=2", "train.global_batch=2", "optim.learning_rate=0.01")
    run(
        recipe_of(
            base, DEMO / "data" / "eval.jsonl", folder / "run", *steps, "data.max_length=256", *ADAPTERS.get(name, ())
        )
    )
    loaded = load_run(str(folder / "run"))
    for target in targets:
        export_run(
            loaded, ExportRequest(target, rows=16 if target in ("merged", "gguf") else None), str(folder / target)
        )
    write_reference(folder)
    return folder


def write_reference(folder: Path) -> None:
    """Prompt ids and answers of `qlora generate RUN`."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations()))
    rows = qlora("generate", folder / "run", prompts, "--max-new-tokens", TOKENS, "--json").json["rows"]
    reference = {"prompts": [row["input_ids"] for row in rows], "answers": [row["output_ids"] for row in rows]}
    (folder / "reference.json").write_text(json.dumps(reference))
