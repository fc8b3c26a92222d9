"""The table of programs for an adapter: PEFT, vLLM, SGLang, llama.cpp, Ollama, mlx-lm."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.adapters.peft_files import CONFIG
from qlora.errors import AdapterError
from qlora.exporters.served_names import refuse_unmatched, served_class
from qlora.exporters.server_support import Server, listed, version_of
from qlora.runs.report.model_card import Loading, is_hub_name
from qlora.utils.atomic_files import read_json

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # allowed values of --max-lora-rank; its default is 16
LLAMA_CPP = "the converter of llama-cpp-python 0.3.36"
OLLAMA = Server("Ollama", False, "takes no adapters since 0.34.1 (ollama PR #14969, 2026-09-15): use --to ollama")
MERGE = "use --to merged"


@dataclass(frozen=True)
class ServedBase:
    """The base of an adapter: its name in commands, its folder, and how PEFT loads it."""

    name: str
    folder: Path
    loading: Loading = Loading()  # noqa: RUF009


def adapter_table(target: str, folder: Path, out: str, base: ServedBase) -> list[Server]:
    """The table for the adapter in `folder`, which will be at `out`."""
    if target == "mlx":
        return _mlx_table(out, base)
    config = read_json(folder / CONFIG)
    peft = Server("PEFT", True, _peft_version(config), "; ".join(base.loading.lines(base.name, out)))
    reason = _not_for_servers(config)
    if reason:
        rows = [Server(name, False, f"{reason[0]} ({source}): {reason[1]}") for name, source in _SOURCES.items()]
        return [peft, *rows, OLLAMA, _mlx_hint(config)]
    unmatched = _unmatched(folder, base)
    if unmatched:
        servers = [Server(name, False, unmatched) for name in ("vLLM", "SGLang")]
    else:
        servers = [_vllm(config, out, base), _sglang(config, out, base)]
    return [peft, *servers, _llama_cpp(config, out, base), OLLAMA, _mlx_hint(config)]


_SOURCES = {
    "vLLM": "0.32.0 refuses it",
    "SGLang": "0.5.23 has none of it",
    "llama.cpp": f"{LLAMA_CPP} refuses it",
}


def _not_for_servers(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """What in the adapter no server loads, and what to use instead."""
    if config.get("use_dora"):
        return "does not support DoRA", "use --to merged, or --to portable for the nearest LoRA"
    if config.get("modules_to_save") or config.get("trainable_token_indices"):
        return "does not support modules to save or trainable tokens", MERGE
    if config.get("target_parameters"):
        return "loads no updates of experts (target_parameters)", MERGE
    return None


def _peft_version(config: Mapping[str, Any]) -> str:
    if config.get("target_parameters"):
        return "PEFT 0.19.1 or later: updates of experts"
    if config.get("trainable_token_indices"):
        return "PEFT 0.15 or later: 0.14 leaves trained rows out with a warning only"
    return "PEFT 0.14 and 0.21 give the same answers (2026-11-25)"


def _is_rescaled(config: Mapping[str, Any]) -> bool:
    return bool(config.get("use_rslora") or config.get("rank_pattern") or config.get("alpha_pattern"))


def _rank(config: Mapping[str, Any]) -> int:
    return max([int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())])


def _vllm(config: Mapping[str, Any], out: str, base: ServedBase) -> Server:
    rank = next((allowed for allowed in VLLM_RANKS if allowed >= _rank(config)), None)
    if rank is None:
        return Server("vLLM", False, f"supports ranks up to {VLLM_RANKS[-1]}: use `qlora resize`, or {MERGE[4:]}")
    command = f"vllm serve {base.name} --enable-lora --max-lora-rank {rank} --lora-modules mine={out}"
    return listed("vLLM", read_json(base.folder / "config.json"), command)


def _sglang(config: Mapping[str, Any], out: str, base: ServedBase) -> Server:
    if _is_rescaled(config):
        return Server("SGLang", False, f"{version_of('SGLang')} scales by alpha / r, another update: use --to portable")
    options = f"--lora-paths mine={out} --max-lora-rank {_rank(config)}"
    command = f"python -m sglang.launch_server --model-path {base.name} {options}"
    return listed("SGLang", read_json(base.folder / "config.json"), command)


def _unmatched(folder: Path, base: ServedBase) -> str | None:
    """Why a server would leave the adapter out: names of another class of the same checkpoint."""
    served = served_class(base.folder)
    try:
        refuse_unmatched(folder, served)
    except AdapterError:
        return f"builds {type(served).__name__}, whose modules have other names than this adapter's: use --to portable"
    return None


def _llama_cpp(config: Mapping[str, Any], out: str, base: ServedBase) -> Server:
    if _is_rescaled(config):
        return Server("llama.cpp", False, f"{LLAMA_CPP} loses the scaling: use --to gguf-adapter")
    option = "--base-model-id" if is_hub_name(base.name) else "--base"
    command = f"python convert_lora_to_gguf.py {option} {base.name} {out}"
    return Server("llama.cpp", True, f"{LLAMA_CPP}; or use --to gguf-adapter", command)


def _mlx_hint(config: Mapping[str, Any]) -> Server:
    whole = config.get("modules_to_save") or config.get("trainable_token_indices") or config.get("target_parameters")
    return Server("mlx-lm", False, f"has a format of its own: {MERGE if whole else 'use --to mlx'}")


def _mlx_table(out: str, base: ServedBase) -> list[Server]:
    command = f'mlx_lm.generate --model {base.name} --adapter-path {out} --prompt "Hello"'
    mlx = listed("mlx-lm", read_json(base.folder / "config.json"), command)
    others = [Server(name, False, "reads PEFT's format: use --to portable") for name in ("PEFT", "vLLM", "SGLang")]
    gguf = [Server("llama.cpp", False, "reads GGUF: use --to gguf-adapter"), OLLAMA]
    return [mlx, *others, *gguf]
