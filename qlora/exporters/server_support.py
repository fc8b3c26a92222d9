"""Which programs load an export, and the command line for each.

From the sources and issue threads of these programs in 2026, not tested: a later release may support more.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.adapters.peft_files import CONFIG

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # allowed values of --max-lora-rank; its default is 16
# Architectures of a safetensors folder that Ollama's converter supports; a plain Mistral or Qwen3 is not among them.
OLLAMA = (
    "LlamaForCausalLM", "MixtralForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
    "Phi3ForCausalLM", "Qwen2ForCausalLM",
)  # fmt: skip
# vLLM ignores rank_pattern and alpha_pattern without a warning (vllm-omni #6565) and supports rsLoRA. SGLang scales by
# alpha / r, llama.cpp's converter writes lora_alpha only: both lose rsLoRA and patterns. Ollama reads few adapters.


@dataclass(frozen=True)
class Server:
    """A row of the table: the program, whether it loads the folder, and the command or the reason."""

    name: str
    accepts: bool
    how: str


def servers(target: str, folder: Path, out: str, base: str) -> list[Server]:
    """The table for what was written to `folder` and will be at `out`; `base` is the base's name in commands."""
    if target in ("merged", "ollama"):
        return _model_table(out, _read_json(folder / "config.json"), target == "ollama")
    return _adapter_table(out, _read_json(folder / CONFIG), base)


def as_text(table: list[Server]) -> str:
    """The table as text, a program per line."""
    width = max(len(server.name) for server in table)
    return "\n".join(f"  {server.name:{width}}  {'yes' if server.accepts else 'no '}  {server.how}" for server in table)


def _adapter_table(out: str, config: Mapping[str, Any], base: str) -> list[Server]:
    if config.get("use_dora"):
        return _peft_only(out, base, "does not support DoRA: use --to merged, or --to portable for the nearest LoRA")
    if config.get("modules_to_save") or config.get("trainable_token_indices"):
        return _peft_only(out, base, "does not support modules to save or trainable tokens: use --to merged")
    if config.get("target_parameters"):
        return _peft_only(out, base, "loads no updates of experts (target_parameters): use --to merged")
    patterns = bool(config.get("rank_pattern") or config.get("alpha_pattern"))
    rescaled = bool(config.get("use_rslora")) or patterns
    rank = max([int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())])
    max_lora_rank = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    portable = "use --to portable"
    return [
        Server("PEFT", True, _peft(out, base)),
        _vllm(out, base, patterns, max_lora_rank),
        Server("SGLang", False, f"would use another scaling: {portable}") if rescaled else Server(
            "SGLang", True, f"python -m sglang.launch_server --model-path {base} --lora-paths mine={out} "
            f"--max-lora-rank {rank}"
        ),
        Server("llama.cpp", False, f"its converter loses the scaling: {portable}") if rescaled else Server(
            "llama.cpp", True, f"python convert_lora_to_gguf.py --base {base} {out}"
        ),
        Server("Ollama", False, "loads merged models: use --to ollama"),
    ]  # fmt: skip


def _peft_only(out: str, base: str, reason: str) -> list[Server]:
    others = [Server(name, False, reason) for name in ("vLLM", "SGLang", "llama.cpp", "Ollama")]
    return [Server("PEFT", True, _peft(out, base)), *others]


def _peft(out: str, base: str) -> str:
    return f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{out}")'


def _vllm(out: str, base: str, patterns: bool, rank: int | None) -> Server:
    if patterns:
        return Server("vLLM", False, "ignores rank and alpha patterns without a warning: use --to portable")
    if rank is None:
        return Server("vLLM", False, f"supports ranks up to {VLLM_RANKS[-1]}: use `qlora resize`, or --to merged")
    return Server("vLLM", True, f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules mine={out}")


def _model_table(out: str, config: Mapping[str, Any], has_modelfile: bool) -> list[Server]:
    (architecture, *_) = config.get("architectures") or ["?"]
    convert = f"python convert_hf_to_gguf.py {out} --outfile {out}/model.gguf"
    if architecture not in OLLAMA:
        ollama = Server("Ollama", False, f"does not convert {architecture}: {convert}, then FROM ./model.gguf")
    elif has_modelfile:
        ollama = Server("Ollama", True, f"ollama create mine -f {out}/Modelfile")
    else:
        ollama = Server("Ollama", False, "needs a Modelfile: use --to ollama")
    return [
        Server("transformers", True, f'AutoModelForCausalLM.from_pretrained("{out}")'),
        Server("vLLM", True, f"vllm serve {out}"),
        Server("SGLang", True, f"python -m sglang.launch_server --model-path {out}"),
        Server("llama.cpp", True, convert),
        ollama,
    ]


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
