"""Tokens per second and peak memory against the peers, on the same rows in one run: python benchmarks/speed.py --help.

Every contender lives in a process of its own and they step in turn, so that a noisy machine is noisy for all. What a
step's matmuls alone would take is measured between the steps.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import RESULTS, Race, write
from contenders import ours, ours_compiled, ours_recomputing, peft_classic, trl_defaults
from workloads import RANK, SHAPES, make_base, rows_of

CONTENDERS = {
    "ours": ours,
    "ours, all layers recomputed": ours_recomputing,
    "ours, compiled": ours_compiled,
    "B1 TRL": trl_defaults,
    "B0 PEFT": peft_classic,
}


def matmul_seconds(shape: dict[str, Any], tokens: int, device: str) -> float:
    """Seconds that a step's frozen products alone take: each forward, and backward for its input, and the head's."""
    import torch

    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    narrow = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    sides = [(hidden, hidden)] * 2 + [(hidden, narrow)] * 2 + [(hidden, wide)] * 2 + [(wide, hidden)]
    counted = [(each, shape["num_hidden_layers"]) for each in sides] + [((hidden, shape["vocab_size"]), 1)]
    total = 0.0
    for (inside, outside), times in counted:
        x, weight = (torch.randn(n, inside, dtype=torch.bfloat16, device=device) for n in (tokens, outside))
        gradient = torch.randn(tokens, outside, dtype=torch.bfloat16, device=device)
        taken = []
        for _ in range(5):
            started = time.perf_counter()
            x @ weight.t(), gradient @ weight
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
        total += times * statistics.median(taken)
    return total


def race(options: argparse.Namespace) -> dict[str, Any]:
    """All chosen contenders on one workload."""
    chosen = {name: run for name, run in CONTENDERS.items() if not options.only or name in options.only}
    steps = options.warm_up + options.rounds + 1
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.base or Path(scratch)
        make_base(folder, options.shape, options.device)
        cap_bytes = int(options.cap_gib * 2**30) if options.cap_gib else None
        work = {"folder": str(folder), "batch": options.batch, "length": options.length, "short": options.short}
        running = Race(chosen, steps=steps, device=options.device, cap_bytes=cap_bytes, **work)
        found = running.run(options.warm_up, options.rounds)
    rows = rows_of(options.batch * steps, options.length, options.short)[options.warm_up * options.batch :]
    tokens = sum(map(len, rows[: options.rounds * options.batch])) / options.rounds
    for result in found.values():
        result["tokens_per_second"] = options.rounds * tokens / sum(result["seconds"])
    workload = {"shape": options.shape, "rank": RANK, **work, "device": options.device, "tokens_per_step": tokens}
    workload |= {"folder": "random weights", "cap_gib": options.cap_gib}
    return with_limit({"workload": workload, "contenders": found})


def with_limit(result: dict[str, Any]) -> dict[str, Any]:
    """A race's result with the seconds of its matmuls, measured now, and each contender's share of their speed."""
    work = result["workload"]
    limit = matmul_seconds(SHAPES[work["shape"]], int(work["tokens_per_step"]), work["device"])
    for found in result["contenders"].values():
        found["share_of_matmul_limit"] = limit / (sum(found["seconds"]) / len(found["seconds"]))
    return {**result, "matmul_seconds": limit}


def main() -> None:
    """Race and write results/NAME.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="rows a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a row (short rows: at most)")
    parser.add_argument("--short", action="store_true", help="rows as short as an instruction set's; ours packs them")
    parser.add_argument("--shape", choices=SHAPES, default="100M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cap-gib", type=float, help="of a card's memory, to stand for a smaller one")
    parser.add_argument("--base", type=Path, help="keep the random base here for the next race")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--name", default="speed")
    parser.add_argument("--limit-only", action="store_true", help="measure the matmuls of results/NAME.json again")
    options = parser.parse_args()
    if options.limit_only:
        path = RESULTS / f"{options.name}.json"
        path.write_text(json.dumps(with_limit(json.loads(path.read_text())), indent=2) + "\n")
        return
    result = race(options)
    for name, found in result["contenders"].items():
        print(
            f"{name:28} {found['tokens_per_second']:8.1f} tokens/s  peak {found['peak_bytes'] / 2**20:8.0f} MiB  "
            f"{100 * found['share_of_matmul_limit']:4.0f} % of the matmuls' own speed  "
            f"first loss {found['first_loss']:.4f}"
        )
    print(write(options.name, result))


if __name__ == "__main__":
    main()
