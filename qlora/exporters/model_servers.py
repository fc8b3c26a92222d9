"""The table of programs for an exported model: a merged folder, a GGUF file, a folder for Ollama."""

from pathlib import Path

from qlora.exporters import ADAPTERS
from qlora.exporters.adapter_servers import OLLAMA, ServedBase, adapter_table
from qlora.exporters.server_support import Server, listed, mlx_problem
from qlora.utils.atomic_files import read_json

GGUF_READERS = "b11669 (2026-11-26)"
IMPORT = "docs.ollama.com/import (2026-09); ollama itself was not run here"


def servers(target: str, folder: Path, out: str, base: ServedBase) -> list[Server]:
    """The table for what was written to `folder` and will be at `out`."""
    if target in ADAPTERS:
        return adapter_table(target, folder, out, base)
    if target == "gguf-adapter":
        return _gguf_adapter_table(folder, out)
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if files:
        return _gguf_table(f"{out}/{files[0]}", out, (folder / "Modelfile").is_file())
    return _folder_table(folder, out, target == "ollama")


def _folder_table(folder: Path, out: str, has_modelfile: bool) -> list[Server]:
    config = read_json(folder / "config.json")
    problem = mlx_problem(config)
    mlx = listed("mlx-lm", config, f'mlx_lm.generate --model {out} --prompt "Hello"')
    ollama = Server("Ollama", False, "its importer has few architectures (ollama#17264, 2026-07): use --to ollama")
    if has_modelfile:
        command = f"ollama create mine -f {out}/Modelfile"
        ollama = Server("Ollama", True, f"if its importer has the architecture; {IMPORT}", command)
    load = f'AutoModelForCausalLM.from_pretrained("{out}")'
    return [
        Server("transformers", True, "5.24 and 4.57 give the same answers (2026-11-26)", load),
        listed("vLLM", config, f"vllm serve {out}"),
        listed("SGLang", config, f"python -m sglang.launch_server --model-path {out}"),
        Server("llama.cpp", False, "reads GGUF files: use --to gguf"),
        ollama,
        Server("mlx-lm", False, problem) if problem else mlx,
    ]


def _gguf_table(file: str, out: str, has_modelfile: bool) -> list[Server]:
    ollama = Server("Ollama", False, "needs a Modelfile: use --to ollama")
    if has_modelfile:
        ollama = Server("Ollama", True, IMPORT, f"ollama create mine -f {out}/Modelfile")
    lossy = "5.24 computes another model from a GGUF (Llama 3's rope scaling, Gemma 3's windows): use --to merged"
    return [
        Server("llama.cpp", True, f"{GGUF_READERS} answered as the run, nine models", f"llama-server -m {file}"),
        ollama,
        Server("transformers", False, lossy),
    ]


def _gguf_adapter_table(folder: Path, out: str) -> list[Server]:
    file = next(path.name for path in sorted(folder.glob("*.gguf")))
    command = f"llama-server -m BASE.gguf --lora {out}/{file}"
    return [Server("llama.cpp", True, "b11669 loads files of this form; compared by reading back", command), OLLAMA]
