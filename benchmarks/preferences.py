"""Preference tuning against TRL's DPOTrainer on the same pairs: python benchmarks/preferences.py --help.

DPO with the base, adapter off, as the reference, in one pass over new pairs, so that neither side gains by keeping the
reference's log-probabilities. Every contender has its own process, and they step in turn. A pair counts as the tokens
of its prompt and both answers, once, for everyone. Writes results/preferences.json.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from contenders import adapted_base, four_bit_base, step_timer
from harness import Race, StepGate, write
from workloads import ALPHA, END, RANK, SHAPES, TARGETS, WORDS, make_base

BETA, LEARNING_RATE, CLIP = 0.1, 2e-5, 1.0
TRL_BATCH = 8  # TRL's default micro-batch, in pairs
Pair = tuple[list[int], list[int], list[int]]  # ids of prompt, chosen and rejected answer


def random_pairs(count: int, prompt: int, answer: int) -> list[Pair]:
    """`count` pairs of random tokens, of the same lengths; answers end with the token END."""
    import numpy as np

    draw = np.random.default_rng(1)

    def ids(length: int) -> list[int]:
        return draw.integers(3, WORDS, length).tolist()  # type: ignore[no-any-return]

    return [(ids(prompt), [*ids(answer - 1), 1], [*ids(answer - 1), 1]) for _ in range(count)]


def qlora(gate: StepGate, micro_batch: int | None = None, recompute: int | None = 0, **work: Any) -> None:
    """The project under test, assembled as in `qlora train`; `micro_batch` in pairs, None: all of a step.

    `recompute`: number of layers, from the first, that recompute (None: all).
    """
    from functools import partial

    import torch

    from qlora.adapters.switch import disable_adapters
    from qlora.training import OPTIMIZERS
    from qlora.training.objectives import OBJECTIVES, Objective
    from qlora.training.objectives.comparison_step import ComparisonStep
    from qlora.training.optimizers import parameter_groups
    from qlora.training.side_log_probs import SideLogProbs

    optimizers = OPTIMIZERS["paged_adamw_32bit"]
    base = adapted_base(gate, recompute, work)
    model = SideLogProbs(base.model).train()
    objective = OBJECTIVES["dpo"](Objective(kind="dpo", beta=BETA))
    step = ComparisonStep(objective, model, partial(disable_adapters, base.model))
    trainable = {name: value for name, value in base.model.named_parameters() if value.requires_grad}
    optimizer = optimizers.build(parameter_groups(trainable, LEARNING_RATE, None), (0.9, 0.999), 0.0)
    batches = iter(_steps(work))
    gate.ready("loaded")
    while gate.wait():
        started = time.perf_counter()
        pairs, total = _examples(next(batches)), 0.0
        size = micro_batch or len(pairs)
        for start in range(0, len(pairs), size):
            batch = step.collate(pairs[start : start + size], 0)
            loss = step.sums(model, batch, None)[0] / len(pairs)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(list(trainable.values()), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate.done(started, total)


def _steps(work: dict[str, Any]) -> Iterator[list[Pair]]:
    """The pairs of each step."""
    pairs = random_pairs(work["batch"] * work["steps"], work["prompt"], work["answer"])
    for start in range(0, len(pairs), work["batch"]):
        yield pairs[start : start + work["batch"]]


def _examples(pairs: Sequence[Pair]) -> list[Any]:
    """Pairs as prefix trees."""
    import numpy as np

    from qlora.data.pairs import pair_of
    from qlora.data.types import IGNORED, Example

    def conversation(prompt: list[int], answer: list[int]) -> Example:
        labels = [IGNORED] * len(prompt) + answer
        return Example("", np.array(prompt + answer, np.int32), np.array(labels, np.int32))

    return [
        pair_of("", conversation(prompt, chosen), conversation(prompt, rejected)) for prompt, chosen, rejected in pairs
    ]


def qlora_pair_by_pair(gate: StepGate, **work: Any) -> None:
    """The same with a micro-batch of one pair, as recipes have by default."""
    qlora(gate, micro_batch=1, **work)


def qlora_recomputing(gate: StepGate, **work: Any) -> None:
    """The same with every layer recomputed, as TRL does by default."""
    qlora(gate, recompute=None, **work)


def trl_defaults(gate: StepGate, micro_batch: int = TRL_BATCH, **work: Any) -> None:
    """DPOTrainer with its defaults; only base, adapter, batch size, dtype and learning rate are set."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    gate.imported()
    batch = min(work["batch"], micro_batch)
    with tempfile.TemporaryDirectory() as output:
        config = DPOConfig(
            output_dir=output, per_device_train_batch_size=batch, gradient_accumulation_steps=work["batch"] // batch,
            max_steps=work["steps"], logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", beta=BETA,
            bf16=work["dtype"] == "bfloat16", train_sampling_strategy="sequential", max_grad_norm=CLIP,
        )  # fmt: skip
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
        columns = zip(*(pair for pairs in _steps(work) for pair in pairs), strict=True)
        texts = [
            [" ".join(END if token == 1 else f"w{token}" for token in ids) for ids in column] for column in columns
        ]
        prompts, *answers = texts
        rows = {"prompt": [f"{prompt} " for prompt in prompts], "chosen": answers[0], "rejected": answers[1]}
        trainer = DPOTrainer(
            four_bit_base(work), args=config, train_dataset=Dataset.from_dict(rows), peft_config=lora,
            processing_class=AutoTokenizer.from_pretrained(work["folder"]), callbacks=[step_timer(gate)],
        )  # fmt: skip
        first = trainer.train_dataset[0]
        lengths = [len(first[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
        assert lengths == [work["prompt"], work["answer"], work["answer"]], lengths
        gate.ready("loaded")
        trainer.train()


def trl_pair_by_pair(gate: StepGate, **work: Any) -> None:
    """The same with a micro-batch of one pair."""
    trl_defaults(gate, micro_batch=1, **work)


CONTENDERS = {  # by their keys in the results file
    "ours": qlora,
    "ours, one pair a micro-batch": qlora_pair_by_pair,
    "ours, all layers recomputed": qlora_recomputing,
    "TRL DPO": trl_defaults,
    "TRL DPO, one pair a micro-batch": trl_pair_by_pair,
}


def main() -> None:
    """Run the race and write results/NAME.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--batch", type=int, default=TRL_BATCH, help="pairs a step")
    parser.add_argument("--prompt", type=int, default=400, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=100, help="tokens of an answer")
    parser.add_argument("--shape", choices=SHAPES, default="100M")
    parser.add_argument("--dtype", default="float32", help="of base and compute; CPUs without 16-bit units: float32")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--name", default="preferences")
    options = parser.parse_args()
    contenders = {name: run for name, run in CONTENDERS.items() if not options.only or name in options.only}
    work, load = {name: getattr(options, name) for name in ("batch", "prompt", "answer", "dtype")}, os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        make_base(Path(scratch), options.shape, "cpu")
        steps = options.warm_up + options.rounds + 1
        running = Race(contenders, steps=steps, device="cpu", folder=scratch, **work)
        results = running.run(options.warm_up, options.rounds)
    tokens = options.batch * (options.prompt + 2 * options.answer)
    for name, result in results.items():
        result["tokens_per_second"] = tokens / result["median_seconds"]
        print(
            f"{name:34} {result['tokens_per_second']:8.1f} tokens/s  peak {result['peak_bytes'] / 2**20:8.0f} MiB  "
            f"losses {result['first_loss']:.4f} to {result['last_loss']:.4f}"
        )
    workload = {"shape": options.shape, "rank": RANK, **work, "device": "cpu", "tokens_per_step": tokens}
    loads = {"before": load, "after": os.getloadavg()[0], "cores": os.cpu_count()}  # above the cores: a busy machine
    print(write(options.name, {"workload": workload, "load_average": loads, "contenders": results}))


if __name__ == "__main__":
    main()
