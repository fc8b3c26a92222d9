"""Trained tokens per second of packing against padding on the same examples: python benchmarks/packing.py.

A small random Llama whose query projections train, with the loss of the training loop. Padding is what trainers do
without packing: shuffled micro-batches, padded to the longest example or to max_length. Writes results/packing.json.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from harness import write
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.data.batching.collate import Batch, collate
from qlora.data.batching.packing import pack
from qlora.data.batching.sampler import Sampler
from qlora.data.types import IGNORED, Example, trained_tokens
from qlora.model.attention import DOCUMENT_ATTENTION
from qlora.training.loss import TokenLoss

SHAPE = {
    "vocab_size": 2_048, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 2_048,
}  # fmt: skip
MAX_LENGTH, MEDIAN = 2_048, 100
PACKED = "packed, 1 x 2048"
SPREADS = {"narrow": 0.6, "broad": 1.0}  # sigma of the lognormal lengths: as in Alpaca, as in Dolly


def random_examples(count: int, sigma: float) -> list[Example]:
    """Examples with an instruction data set's lengths; the second half of each is trained."""
    rng = np.random.default_rng(0)
    examples = []
    for length in np.clip(rng.lognormal(np.log(MEDIAN), sigma, count).astype(int), 8, MAX_LENGTH):
        ids = rng.integers(3, SHAPE["vocab_size"], length).astype(np.int32)
        examples.append(Example("", ids, np.where(np.arange(length) < length // 2, IGNORED, ids)))
    return examples


def padded(examples: Sequence[Example], micro_batch: int, length: int | None = None) -> list[Batch]:
    """Shuffled examples in micro-batches, padded to the longest of each, or to `length`."""
    order = Sampler("shuffle", len(examples), 0).indices(examples, 0)
    groups = [order[start : start + micro_batch] for start in range(0, len(order), micro_batch)]
    batches = []
    for group in groups:
        batch = collate([examples[i] for i in group], 0)
        extra = (0, (length or batch.input_ids.shape[1]) - batch.input_ids.shape[1])
        ids, positions = (torch.nn.functional.pad(t, extra) for t in (batch.input_ids, batch.position_ids))
        labels = torch.nn.functional.pad(batch.labels, extra, value=IGNORED)
        batches.append(Batch(ids, labels, positions, batch.tokens, batch.layout))
    return batches


def packed(examples: Sequence[Example]) -> list[Batch]:
    """Packed sequences, one in a micro-batch."""
    return [collate([sequence], 0) for sequence in pack(examples, MAX_LENGTH)]


def seconds_of(loss: TokenLoss, batches: Sequence[Batch]) -> tuple[float, float]:
    """Forward and backward of one optimizer step: wall-clock and processor seconds."""
    started, processor = time.perf_counter(), time.process_time()
    for batch in batches:
        loss(batch.input_ids, batch.labels, batch.position_ids, batch.layout).backward()
    seconds = time.perf_counter() - started, time.process_time() - processor
    loss.zero_grad(set_to_none=True)
    return seconds


def race(loss: TokenLoss, examples: Sequence[Example], rounds: int) -> dict[str, Any]:
    """Every way of batching, in turn; medians of seconds and of the ratio to packing in the same round."""
    few = examples[: max(1, len(examples) // 16)]  # all of them at full length would take a minute
    ways = {
        PACKED: (packed(examples), examples),
        **{f"padded to the longest, micro-batch {n}": (padded(examples, n), examples) for n in (8, 16, 32)},
        "padded to 2048, micro-batch 1": (padded(few, 1, MAX_LENGTH), few),
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for batches, _ in ways.values():
        seconds_of(loss, batches[:1])
    for number in range(rounds):
        for name in list(ways) if number % 2 else reversed(list(ways)):
            batches, subset = ways[name]
            clock, processor = seconds_of(loss, batches)
            rates[name].append((trained_tokens(subset) / clock, trained_tokens(subset) / processor))
        print(f"  round {number + 1}: " + ", ".join(f"{rate[-1][1]:.0f}" for rate in rates.values()), flush=True)
    return {
        name: {
            "trained_tokens_per_second": [clock for clock, _ in rates[name]],
            "trained_tokens_per_processor_second": [processor for _, processor in rates[name]],
            "median_per_processor_second": statistics.median(processor for _, processor in rates[name]),
            "share_of_pads": 1 - sum(map(len, subset)) / sum(batch.input_ids.numel() for batch in batches),
            "packing_is_faster_by": {
                way: statistics.median(a[i] / b[i] for a, b in zip(rates[PACKED], rates[name], strict=True))
                for i, way in enumerate(("clock", "processor"))
            },
        }
        for name, (batches, subset) in ways.items()
    }


def main() -> None:
    """Run the race on both data sets and write results/packing.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.set_attn_implementation(DOCUMENT_ATTENTION)
    for name, parameter in model.named_parameters():  # gradients reach every layer, as with adapters
        parameter.requires_grad_(name.endswith("q_proj.weight"))
    loss, results = TokenLoss(model).train(), {}
    for spread, sigma in SPREADS.items():
        examples = random_examples(options.rows, sigma)
        lengths = [len(example) for example in examples]
        print(f"{spread}: {len(examples)} examples, median {statistics.median(lengths)}, longest {max(lengths)} tokens")
        results[spread] = {
            "sigma": sigma, "rows": len(examples), "median_tokens": statistics.median(lengths),
            "mean_tokens": statistics.mean(lengths), "longest_tokens": max(lengths),
            "ways": race(loss, examples, options.rounds),
        }  # fmt: skip
        for name, way in results[spread]["ways"].items():
            ratio = way["packing_is_faster_by"]
            print(f"  {name:38} {way['median_per_processor_second']:7.0f} trained tokens per processor second, "
                  f"packing x{ratio['processor']:.2f} (clock x{ratio['clock']:.2f})")  # fmt: skip
    parameters = sum(parameter.numel() for parameter in model.parameters())
    settings = {"shape": SHAPE, "parameters": parameters, "threads": options.threads, "max_length": MAX_LENGTH}
    print(write("packing", {**settings, "sets": results}))


if __name__ == "__main__":
    main()
