"""Loading a base model: seconds and peak memory of a first start, a second start, and transformers' loader.

A random Llama in one bfloat16 file of `--gigabytes`, each contender in a new process, in turn; the file is in the page
cache for all of them. `python benchmarks/loading.py` writes results/loading.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import write
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).parents[1]
CHILD = """
import json, resource, sys, time, torch
torch.set_num_threads(1)
folder = sys.argv[1]
{imports}
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
before, started, cpu_started = resident(), time.monotonic(), time.process_time()
{load}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
cpu = time.process_time() - cpu_started
result = {{"seconds": time.monotonic() - started, "cpu_seconds": cpu, "peak_bytes": peak, "imports_bytes": before}}
print(json.dumps(result))
"""
QLORA = {
    "imports": "from qlora.model import Model\nfrom qlora.model.load_base import load\n"
    "from qlora.quant import Quant, build_quantizer\n"
    "import qlora.quant.bitsandbytes_ops, transformers.models.llama.modeling_llama\n"
    "from qlora.memory.malloc import return_freed_memory",
    "load": "return_freed_memory()\nbase = load(Model(name=folder), build_quantizer(Quant()), torch.device('cpu'))",
}
TRANSFORMERS = {
    "imports": "from transformers import AutoModelForCausalLM, BitsAndBytesConfig\nimport bitsandbytes\n"
    "import transformers.models.llama.modeling_llama",
    "load": "config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, "
    "bnb_4bit_compute_dtype=torch.bfloat16)\n"
    "model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16, "
    "device_map={'': 'cpu'})",
}


def make(folder: Path, gigabytes: float, vocabulary: int = 32000) -> int:
    """Save a random Llama in one file of about `gigabytes`; returns the file's bytes."""
    width, middle = 2048, 5632
    layer = 2 * (4 * width * width + 3 * width * middle)
    layers = max(1, int((gigabytes * 1e9 - 4 * vocabulary * width) // layer))
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=middle, num_hidden_layers=layers,
        num_attention_heads=16, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        named = dict(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).named_parameters())
    noise = (torch.randn(2**22) / 50).bfloat16()
    save_file(
        {name: noise.repeat(-(-p.numel() // noise.numel()))[: p.numel()].reshape(p.shape) for name, p in named.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(folder)
    for file in (ROOT / "qlora/demo/base").glob("*token*"):
        shutil.copy(file, folder)
    return (folder / "model.safetensors").stat().st_size


def measured(contender: dict[str, str], folder: Path, cache: Path) -> dict[str, Any]:
    """Seconds and bytes of one load in a new process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "QLORA_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", CHILD.format(**contender), str(folder)],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Run the race and write results/loading.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "base"
        folder.mkdir()
        maker = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'benchmarks')!r}]; "
             f"from pathlib import Path; import loading; print(loading.make(Path({str(folder)!r}), "
             f"{options.gigabytes}))"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        file_bytes = int(maker.stdout)
        contenders = {"first start": QLORA, "second start": QLORA, "transformers": TRANSFORMERS}
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        for number in range(options.rounds):
            cache = Path(scratch) / f"cache-{number}"
            for name, contender in contenders.items():
                last = measured(contender, folder, cache)
                results[name].append(last)
                timings = f"{last['seconds']:.1f} s, {last['cpu_seconds']:.1f} s of a core"
                print(f"{name}: {timings}, {last['peak_bytes'] / 1e9:.2f} GB", flush=True)
            shutil.rmtree(cache)
    loads = {name: summary(runs) for name, runs in results.items()}
    print(write("loading", {"file_bytes": file_bytes, "loads": loads}))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds."""
    return {
        "seconds": [round(run["seconds"], 2) for run in runs],
        "median_seconds": round(median(run["seconds"] for run in runs), 2),
        "cpu_seconds": [round(run["cpu_seconds"], 2) for run in runs],
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "imports_bytes": max(run["imports_bytes"] for run in runs),
    }


if __name__ == "__main__":
    main()
