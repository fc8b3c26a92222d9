"""A base of 0.75 billion random bfloat16 weights, an adapter for it, and the peak memory of a child process.

Everything is written tensor by tensor, so that writing takes less memory than what is measured.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, LlamaConfig

from qlora.adapters import peft_files
from qlora.model.linear_layers import linear_paths
from qlora.model.meta_model import build_meta_model
from qlora.model.safetensors_writer import PlannedTensor, write_model
from qlora.utils.atomic_files import write_bytes, write_json
from support.tiny_models import byte_tokenizer

CONFIG = LlamaConfig(
    vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=12, num_attention_heads=16,
    num_key_value_heads=16, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    dtype="bfloat16", architectures=["LlamaForCausalLM"],
)  # fmt: skip
RANK = 16

# Peak and current resident bytes of this process from Linux's /proc; the peak is reset after the imports.
MEASURED = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
{imports}
def resident(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
{work}
print(json.dumps({{"before": before, "peak": resident("VmHWM")}}))
"""


def write_base(folder: Path) -> Path:
    """The base: one model.safetensors of 1.5 GB."""
    folder.mkdir(parents=True)
    model = build_meta_model(AutoConfig.for_model(**CONFIG.to_dict()), torch.bfloat16, "sdpa", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def make(name: str, shape: torch.Size) -> Tensor:
        return torch.ones(shape) if "norm" in name else torch.empty(shape).normal_(0, 0.02, generator=generator)

    planned = [
        PlannedTensor(name, tuple(p.shape), torch.bfloat16, lambda n=name, s=p.shape: make(n, s))  # type: ignore[misc]
        for name, p in model.named_parameters()
    ]
    write_model(folder, planned)
    (folder / "progress.json").unlink()
    (folder / "config.json").write_text(CONFIG.to_json_string(use_diff=False))
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_adapter(base: Path, folder: Path) -> Path:
    """A LoRA of rank 16 on all linear layers, with small random values."""
    folder.mkdir(parents=True)
    model = build_meta_model(AutoConfig.from_pretrained(base), torch.bfloat16, "sdpa", torch.device("cpu"))
    generator, tensors = torch.Generator().manual_seed(1), {}
    for path in linear_paths(model):
        linear = model.get_submodule(path)
        for side, shape in (("A", (RANK, linear.in_features)), ("B", (linear.out_features, RANK))):
            values = torch.empty(shape).normal_(0, 0.02, generator=generator)
            tensors[peft_files.PREFIX + path + peft_files.SUFFIXES[side]] = values
    write_bytes(folder / peft_files.WEIGHTS, peft_files.serialize(tensors))
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "base_model_name_or_path": str(base)}
    leaves = sorted({path.rpartition(".")[2] for path in linear_paths(model)})
    write_json(folder / peft_files.CONFIG, config | {"target_modules": leaves})
    return folder


def peak_above_imports(imports: str, work: str, cache: str = "") -> int:
    """Peak resident bytes of a process that runs `work`, minus what it held after `imports`."""
    code = MEASURED.format(imports=imports, work=work)
    environment = {**os.environ, "QLORA_CACHE": cache, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    resident = json.loads(process.stdout.splitlines()[-1])
    return int(resident["peak"] - resident["before"])
