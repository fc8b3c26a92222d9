"""Tokens per second and peak memory against PEFT and TRL on the same examples: python benchmarks/speed.py --help.

Every contender has its own process, and they step in turn, so that other load on the machine slows all of them alike.
The seconds that a step's matrix products take without anything else are measured after the race.
"""

import argparse
import json
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from contenders import (
    peft_classic,
    qlora,
    qlora_compiled,
    qlora_fused_adamw,
    qlora_recomputing,
    trl_defaults,
    unsloth_plain_loop,
)
from harness import RESULTS, Race, write
from workloads import RANK, SHAPES, make_base, token_lists

CONTENDERS = {  # by their keys in the results files
    "ours": qlora,
    "ours, all layers recomputed": qlora_recomputing,
    "ours, compiled": qlora_compiled,
    "B1 TRL": trl_defaults,
    "B0 PEFT": peft_classic,
}
GPU_CONTENDERS = {"ours, fused AdamW": qlora_fused_adamw} | (
    {"B2 Unsloth": unsloth_plain_loop} if find_spec("unsloth") else {}
)


def matmul_seconds(shape: dict[str, Any], tokens: int, device: str, dtype: str) -> float:
    """Seconds of a step's frozen products: every layer's and the head's, forward and backward for the input."""
    import torch

    hidden, intermediate = shape["hidden_size"], shape["intermediate_size"]
    key_value = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = [(hidden, hidden)] * 2 + [(hidden, key_value)] * 2 + [(hidden, intermediate)] * 2 + [(intermediate, hidden)]
    products = [(sides, shape["num_hidden_layers"]) for sides in layer] + [((hidden, shape["vocab_size"]), 1)]
    total = 0.0
    for (inputs, outputs), count in products:
        options: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
        x, weight = (torch.randn(n, inputs, **options) for n in (tokens, outputs))
        gradient = torch.randn(tokens, outputs, **options)
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            x @ weight.t(), gradient @ weight
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        total += count * statistics.median(seconds)
    return total


def race(options: argparse.Namespace) -> dict[str, Any]:
    """All chosen contenders on one workload."""
    known = CONTENDERS | (GPU_CONTENDERS if options.device == "cuda" else {})
    contenders = {name: run for name, run in known.items() if not options.only or name in options.only}
    steps = options.warm_up + options.rounds + 1
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.base or Path(scratch)
        make_base(folder, options.shape, options.device)
        cap_bytes = int(options.cap_gib * 2**30) if options.cap_gib else None
        work = {"folder": str(folder), "batch": options.batch, "length": options.length, "short": options.short}
        work["dtype"] = options.dtype
        running = Race(contenders, steps=steps, device=options.device, cap_bytes=cap_bytes, **work)
        results = running.run(options.warm_up, options.rounds)
    examples = token_lists(options.batch * steps, options.length, options.short)[options.warm_up * options.batch :]
    tokens = sum(map(len, examples[: options.rounds * options.batch])) / options.rounds
    for result in results.values():
        result["tokens_per_second"] = options.rounds * tokens / sum(result["seconds"])
    workload = {"shape": options.shape, "rank": RANK, **work, "device": options.device, "tokens_per_step": tokens}
    workload |= {"folder": "random weights", "cap_gib": options.cap_gib}
    return with_limit({"workload": workload, "contenders": results})


def with_limit(race_result: dict[str, Any]) -> dict[str, Any]:
    """A race's result with the seconds of its matrix products, measured now, and each contender's fraction of them."""
    work = race_result["workload"]
    limit = matmul_seconds(
        SHAPES[work["shape"]], int(work["tokens_per_step"]), work["device"], work.get("dtype", "bfloat16")
    )
    for result in race_result["contenders"].values():
        result["share_of_matmul_limit"] = limit / (sum(result["seconds"]) / len(result["seconds"]))
    return {**race_result, "matmul_seconds": limit}


def main() -> None:
    """Run the race and write results/NAME.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="examples a step")
    parser.add_argument("--length", type=int, default=512, help="tokens an example (with --short: at most)")
    parser.add_argument("--short", action="store_true", help="lengths of an instruction data set")
    parser.add_argument("--shape", choices=SHAPES, default="100M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="float32: for a CPU without bfloat16 units"
    )
    parser.add_argument("--cap-gib", type=float, help="limit on GPU memory, to imitate a smaller GPU")
    parser.add_argument("--base", type=Path, help="folder that keeps the random base for the next race")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--name", default="speed")
    parser.add_argument("--limit-only", action="store_true", help="only time the matrix products of results/NAME.json")
    options = parser.parse_args()
    if options.limit_only:
        path = RESULTS / f"{options.name}.json"
        path.write_text(json.dumps(with_limit(json.loads(path.read_text())), indent=2) + "\n")
        return
    result = race(options)
    for name, summary in result["contenders"].items():
        print(
            f"{name:28} {summary['tokens_per_second']:8.1f} tokens/s  peak {summary['peak_bytes'] / 2**20:8.0f} MiB  "
            f"{100 * summary['share_of_matmul_limit']:4.0f} % of the speed of the matrix products alone  "
            f"first loss {summary['first_loss']:.4f}"
        )
    print(write(options.name, result))


if __name__ == "__main__":
    main()
