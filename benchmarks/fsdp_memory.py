"""Peak memory of each process that loads and trains a base model: one process, DDP (replicas), FSDP (shards).

A random Llama in one bfloat16 file of `--gigabytes`; memory is a process's peak minus what it held after the imports.
`python benchmarks/fsdp_memory.py` writes results/shares.json.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import write
from loading import ROOT

CHILD = """
import json, resource, sys, time, torch
torch.set_num_threads(1)
from qlora.adapters.inject import inject
from qlora.adapters.lora import Lora
from qlora.model import Model
from qlora.model.load_base import load
from qlora.distributed import STRATEGIES
from qlora.memory.malloc import return_freed_memory
from qlora.memory.activation_recompute import recompute
from qlora.quant import Quant, build_quantizer
from qlora.training.loss import TokenLoss
import qlora.quant.bitsandbytes_ops, transformers.models.llama.modeling_llama
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
return_freed_memory()
processes = STRATEGIES[sys.argv[2]]()
processes.wait()
before, started = resident(), time.monotonic()
base = load(Model(name=sys.argv[1]), build_quantizer(Quant()), torch.device("cpu"), processes=processes)
processes.wait()
result = {"seconds": time.monotonic() - started, "imports": before, "loaded": resident(), "load_peak": peak()}
inject(base.model, Lora(rank=8, alpha=16.0, dropout=0.0), "all-linear", 0)
recompute(base.model, None)
model = processes.wrap(TokenLoss(base.model).train())
ids = torch.randint(8000, (1, 64))
loss = model(ids, ids, torch.arange(64)[None])
processes.backward(loss / 64)
print(json.dumps({**result, "peak": peak(), "loss": float(loss.detach())}))
processes.end()
"""


def measured(kind: str, world: int, folder: Path) -> list[dict[str, Any]]:
    """The measurements that each process prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(world):
        env = os.environ | {"PYTHONPATH": str(ROOT), "QLORA_CACHE": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        if world > 1:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
            env |= {name: str(value) for name, value in ranks.items()} | {"MASTER_PORT": str(port)}
        command = [sys.executable, "-c", CHILD, str(folder), kind]
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=900)[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"{kind}: a process failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def memory_bytes(runs: list[dict[str, Any]]) -> list[int]:
    """Peak bytes above the imports of each process."""
    return [run["peak"] - run["imports"] for run in runs]


def main() -> None:
    """Measure all three strategies and write results/shares.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "base"
        folder.mkdir()
        code = "import sys; from pathlib import Path; import loading; "
        code += "print(loading.make(Path(sys.argv[1]), float(sys.argv[2]), 8000))"
        path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
        maker = subprocess.run(
            [sys.executable, "-c", code, str(folder), str(options.gigabytes)], capture_output=True, text=True,
            check=True, env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        results: dict[str, Any] = {"file_bytes": int(maker.stdout)}
        for kind, world in (("single", 1), ("ddp", 2), ("fsdp", 2)):
            runs = measured(kind, world, folder)
            results[f"{kind}, {world}"] = runs
            print(kind, world, [f"{size / 2**20:,.0f} MiB" for size in memory_bytes(runs)], runs, flush=True)
    single_bytes = memory_bytes(results["single, 1"])[0]
    results["ratio"] = max(memory_bytes(results["fsdp, 2"])) / single_bytes
    print(f"{results['ratio']:.2f} of the single process's memory", write("shares", results))


if __name__ == "__main__":
    main()
