"""Which programs take exactly this export, and the command line for each.

Read in the sources and issue threads of the programs in 2026, not run: a next release may take more.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.adapters.peft_files import CONFIG

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes; its default is 16
# Architectures of a safetensors folder that Ollama's own converter knows; a plain Mistral or Qwen3 is not among them.
OLLAMA = (
    "LlamaForCausalLM", "MixtralForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
    "Phi3ForCausalLM", "Qwen2ForCausalLM",
)  # fmt: skip
# vLLM drops rank_pattern and alpha_pattern in silence (vllm-omni #6565) and honours rsLoRA; SGLang scales by alpha / r
# and llama.cpp's converter writes lora_alpha only, so both lose rsLoRA and patterns; Ollama reads few adapters.


@dataclass(frozen=True)
class Server:
    """One line of the table: the program, whether it takes the folder, and the command or the reason."""

    name: str
    accepts: bool
    how: str


def servers(target: str, folder: Path, out: str, base: str) -> list[Server]:
    """The table for what was written in `folder` and will be found at `out`; `base` is what the base is called."""
    if target in ("merged", "ollama"):
        return _model(out, _json(folder / "config.json"), target == "ollama")
    return _adapter(out, _json(folder / CONFIG), base)


def as_text(rows: list[Server]) -> str:
    """The table for people, a program a line."""
    width = max(len(row.name) for row in rows)
    return "\n".join(f"  {row.name:{width}}  {'yes' if row.accepts else 'no '}  {row.how}" for row in rows)


def _adapter(out: str, config: Mapping[str, Any], base: str) -> list[Server]:
    if config.get("use_dora"):
        refused = "refuses DoRA: use --to merged, or --to portable for the nearest LoRA"
        others = [Server(name, False, refused) for name in ("vLLM", "SGLang", "llama.cpp", "Ollama")]
        return [Server("PEFT", True, _peft(out, base)), *others]
    if config.get("modules_to_save") or config.get("trainable_token_indices"):
        return [Server("PEFT", True, _peft(out, base))] + [
            Server(name, False, "takes no modules or rows that trained whole: use --to merged")
            for name in ("vLLM", "SGLang", "llama.cpp", "Ollama")
        ]
    patterns = bool(config.get("rank_pattern") or config.get("alpha_pattern"))
    scaled = bool(config.get("use_rslora")) or patterns
    rank = max([int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())])
    fits = next((each for each in VLLM_RANKS if each >= rank), None)
    portable = "use --to portable"
    return [
        Server("PEFT", True, _peft(out, base)),
        _vllm(out, base, patterns, fits),
        Server("SGLang", False, f"another scale would be used: {portable}") if scaled else Server(
            "SGLang", True, f"python -m sglang.launch_server --model-path {base} --lora-paths mine={out} "
            f"--max-lora-rank {rank}"
        ),
        Server("llama.cpp", False, f"its converter loses the scale: {portable}") if scaled else Server(
            "llama.cpp", True, f"python convert_lora_to_gguf.py --base {base} {out}"
        ),
        Server("Ollama", False, "takes merged models: use --to ollama"),
    ]  # fmt: skip


def _peft(out: str, base: str) -> str:
    return f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{out}")'


def _vllm(out: str, base: str, patterns: bool, rank: int | None) -> Server:
    if patterns:
        return Server("vLLM", False, "drops rank and alpha patterns in silence: use --to portable")
    if rank is None:
        return Server("vLLM", False, f"takes ranks up to {VLLM_RANKS[-1]}: use `qlora resize`, or --to merged")
    return Server("vLLM", True, f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules mine={out}")


def _model(out: str, config: Mapping[str, Any], has_modelfile: bool) -> list[Server]:
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


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
