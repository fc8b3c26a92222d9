"""Tokens per second of generation, beside transformers' generate on the same 4-bit weights: benchmarks/generation.py.

All contenders are in one process with one thread and take turns: processor seconds, medians of the rounds, so that
other work on the machine changes little. Greedy, no end token: every answer has the same length.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import write
from workloads import make_base, token_lists

LENGTHS = (4, 8, 12, 16, 20, 24, 28, 32)  # tokens of the prompts
Answers = list[list[int]]


def transformers_generate(model: Any, prompts: Sequence[Sequence[int]], count: int) -> Answers:
    """What transformers' own loop makes of a batch, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(list(prompt)), 1
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return [row[width:].tolist() for row in output]  # type: ignore[no-any-return]


def contenders(folder: Path, prompts: Sequence[Sequence[int]]) -> dict[str, Callable[[int], Answers]]:
    """Name -> a function that answers all prompts with as many tokens."""
    return {**qlora_contenders(folder, prompts), **transformers_contenders(folder, prompts)}


def qlora_contenders(folder: Path, prompts: Sequence[Sequence[int]]) -> dict[str, Callable[[int], Answers]]:
    """The project under test, as `qlora generate` answers, and its layers in transformers' loop."""
    from dataclasses import replace

    from qlora.model import Model
    from qlora.model.generate_tokens import RowHooks, generate
    from qlora.model.load_base import load
    from qlora.quant import Quant, build_quantizer
    from qlora.runs.inference_memory import inference_memory

    section = Model(name=str(folder), dtype="float32")
    bases = [load(section, build_quantizer(Quant()), torch.device("cpu")) for _ in range(2)]
    base, adapted = (replace(base, stop_token_ids=()) for base in bases)
    switch = adapter_switch(adapted.model)
    names = [None, "adapter"] * (len(prompts) // 2)

    def with_adapters(count: int) -> Answers:
        with switch.per_row(names) as rows, inference_memory(adapted):
            return generate(adapted, prompts, count, hooks=RowHooks(select=rows.select))

    def one_batch(count: int) -> Answers:
        with inference_memory(base):
            return generate(base, prompts, count)

    def one_by_one(count: int) -> Answers:
        with inference_memory(base):
            return [generate(base, [prompt], count)[0] for prompt in prompts]

    return {
        "qlora, one batch": one_batch,
        "qlora, one batch, base and adapter mixed by row": with_adapters,
        "qlora, one by one": one_by_one,
        "qlora, one batch, no dequantized weights kept": lambda count: generate(base, prompts, count),
        "transformers' generate on qlora's layers, one batch": partial(transformers_generate, base.model, prompts),
    }


def adapter_switch(model: Any) -> Any:
    """The switch of a model to which an adapter of all linear layers is added."""
    from qlora.adapters.inject import inject
    from qlora.adapters.lora import Lora
    from qlora.adapters.switch import AdapterSwitch

    injection = inject(model, Lora(16, 32.0, 0.0), "all-linear", 0)
    layers = {path: model.get_submodule(path) for path in injection.paths}  # before the switch takes their places
    switch = AdapterSwitch(model)
    switch.add("adapter", layers)
    return switch


def transformers_contenders(folder: Path, prompts: Sequence[Sequence[int]]) -> dict[str, Callable[[int], Answers]]:
    """Bitsandbytes' layers in transformers' own loop."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()
    return {
        "transformers and bitsandbytes, one batch": partial(transformers_generate, model, prompts),
        "transformers and bitsandbytes, one by one": lambda count: [
            transformers_generate(model, [prompt], count)[0] for prompt in prompts
        ],
    }


def measured(answer: Callable[[int], Answers], count: int) -> tuple[float, Answers]:
    """Processor seconds, and the answers."""
    started = time.process_time()
    answers = answer(count)
    return time.process_time() - started, answers


def race(folder: Path, count: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds and tokens per second of each contender, and whether its answers are those of qlora one by one."""
    prompts = [ids[:length] for ids, length in zip(token_lists(len(LENGTHS), 128, False), LENGTHS, strict=True)]
    functions = contenders(folder, prompts)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    answers: dict[str, Answers] = {}
    for function in functions.values():
        function(1)  # warms up
    for number in range(rounds):
        for name, function in functions.items() if number % 2 else reversed(functions.items()):
            spent, answers[name] = measured(function, count)
            seconds[name].append(spent)
            print(f"round {number + 1}: {name}: {spent:.2f} s", flush=True)
    tokens = count * len(prompts)
    return {
        name: {
            "seconds": values,
            "tokens_per_second": tokens / statistics.median(values),
            "same_answers": answers[name] == answers["qlora, one by one"],
        }
        for name, values in seconds.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="30M")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder), options.shape, "cpu")
        results = race(Path(folder), options.tokens, options.rounds)
    work = {"shape": options.shape, "tokens": options.tokens, "prompts": LENGTHS, "threads": 1, "dtype": "float32"}
    print(write("generation", {"workload": work, "contenders": results}))
