"""Which programs load an export, and the command line for each: only what a test or a cited source supports.

Sources, by version: `server_architectures.json` (classes that vLLM, SGLang and mlx-lm list), vLLM 0.32.0
(`lora/peft_helper.py`, `lora/lora_model.py`; run), SGLang 0.5.23 (`srt/lora/lora_config.py`, `lora_manager.py`; read),
llama.cpp b11669 and the converters of llama-cpp-python 0.3.36 (run), mlx-lm 0.32.2 (run), Ollama 0.34 (PR #14969,
2026-09-15: no adapters; not run), PEFT 0.14 to 0.21 (run). What was run is in benchmarks/results/clients.json.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROPE_THETA_READERS = ("llama", "mistral", "qwen2", "granite")  # mlx-lm's classes that take a default without the key
VERSIONS = Path(__file__).with_name("server_architectures.json")


@dataclass(frozen=True)
class Server:
    """A row of the table: the program, whether it loads the folder, why, and the command."""

    name: str
    loads: bool
    why: str  # the version that was read or run, or the reason against it
    command: str = ""

    def __str__(self) -> str:
        return f"{self.command}  ({self.why})" if self.loads else self.why


def as_text(table: Sequence[Server]) -> str:
    """The table as text, a program per line."""
    width = max(len(server.name) for server in table)
    return "\n".join(f"  {server.name:{width}}  {'yes' if server.loads else 'no '}  {server}" for server in table)


def _theta(rope: Mapping[str, Any]) -> float:
    return float(rope.get("rope_theta") or 0)


@cache
def _lists() -> dict[str, dict[str, Any]]:
    content: dict[str, dict[str, Any]] = json.loads(VERSIONS.read_text(encoding="utf-8"))
    return content


def version_of(server: str) -> str:
    """The program with the version that was read: `vLLM 0.32.0`."""
    return f"{server} {_lists()[server]['version']}"


def listed(server: str, config: Mapping[str, Any], command: str) -> Server:
    """The row of a program that has, or lacks, the class that a config.json names."""
    architecture = next(iter(config.get("architectures") or ["?"]))
    name = config.get("model_type", "?") if server == "mlx-lm" else architecture
    if name not in _lists()[server]["names"]:
        return Server(server, False, f"{version_of(server)} has no {name}")
    return Server(server, True, f"{version_of(server)} lists {name}", command)


def mlx_problem(config: Mapping[str, Any]) -> str | None:
    """What mlx-lm computes otherwise than transformers for a config.json, or None. Run with mlx-lm 0.32.2."""
    text = config.get("text_config") or config
    kind, version = text.get("model_type", config.get("model_type")), version_of("mlx-lm")
    window, length = text.get("sliding_window"), text.get("max_position_embeddings") or 0
    if kind in ("mistral", "gemma2", "phi3") and window and window < length:
        return (
            f"({version}) has no sliding window for {kind}, this model has one of {window}: it computes another model"
        )
    layers, every = text.get("layer_types"), text.get("sliding_window_pattern") or 6
    if kind == "gemma3_text" and layers:
        expected = ["full_attention" if (at + 1) % every == 0 else "sliding_attention" for at in range(len(layers))]
        if layers != expected or len(layers) < every:
            return f"({version}) has a full layer after {every - 1} with windows for {kind}, this model has others"
    rope = text.get("rope_parameters") or {}
    is_default = kind in ("llama", "mistral") and rope.get("rope_type", "default") == "default"
    if kind in ROPE_THETA_READERS and rope and "rope_theta" not in text and not (is_default and _theta(rope) == 1e4):
        return f"({version}) reads rope_theta for {kind}, config.json has rope_parameters only: use --to merged"
    if kind == "gpt_neox" and "rotary_pct" not in text:
        return f"({version}) reads no config of transformers 5 for {kind}"
    return None
