"""Preparing GSM8K, from a JSONL file to packed sequences, against TRL: python benchmarks/data_preparation.py.

Every measurement is a separate process, contenders in turn; the clock starts when libraries are imported and the
tokenizer is loaded. Both write their caches. qlora: read, check, render, verify the loss masks, filter, split, pack,
cache. TRL: datasets' JSON reader and what SFTTrainer does before its first step. Writes results/data.json.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from harness import peak_bytes, resident_bytes, write

SHARED = Path(__file__).parents[2] / "shared" / "data"
MAX_LENGTH = 2_048
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Counts = dict[str, int]


def make_inputs(folder: Path, records: int | None) -> None:
    """GSM8K as conversations in the format of each contender, and GPT-2's tokenizer with ChatML."""
    lines = (SHARED / "gsm8k" / "train.jsonl").read_text().splitlines()[:records]
    write_conversations(folder, ((line["question"], line["answer"]) for line in map(json.loads, lines)))
    save_tokenizer(folder)


def write_conversations(folder: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Questions with their answers in the format of each contender."""
    with (folder / "qlora.jsonl").open("w") as qlora_file, (folder / "trl.jsonl").open("w") as trl_file:
        for question_text, answer_text in pairs:
            question = {"role": "user", "content": question_text}
            answer = {"role": "assistant", "content": answer_text}
            qlora_file.write(json.dumps({"messages": [question, answer]}) + "\n")
            trl_file.write(json.dumps({"prompt": [question], "completion": [answer]}) + "\n")


def save_tokenizer(folder: Path) -> None:
    """GPT-2's tokenizer with ChatML."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(SHARED / "tokenizers" / "gpt2" / "tokenizer.json"), eos_token="<|im_end|>",
        pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "tokenizer")


def qlora(folder: Path, processes: int) -> Callable[[], Counts]:
    """qlora.data, called as in `qlora train`."""
    from transformers import AutoTokenizer

    from qlora.data import Data
    from qlora.data.conversations import worker_pool
    from qlora.data.conversations.encoder import Encoder
    from qlora.data.prepare import prepare

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core
    worker_pool.available_workers = lambda: processes
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    section = Data.model_validate(
        {"train": str(folder / "qlora.jsonl"), "max_length": MAX_LENGTH, "eval_fraction": 0, "packing": True}
    )

    def run() -> Counts:
        data = prepare(section, Encoder(tokenizer), 0)
        return {"tokens": data.report.tokens, "trained": data.report.trained_tokens, "rows": len(data.train)}

    return run


def trl(folder: Path, processes: int) -> Callable[[], Counts]:
    """TRL's preparation, called as in its trainer."""
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    workers = processes if processes > 1 else None
    config = SFTConfig(
        output_dir=str(folder / "out"), packing=True, max_length=MAX_LENGTH, report_to=[], use_cpu=True, bf16=False,
        dataset_num_proc=workers,
    )  # fmt: skip
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=tokenizer.chat_template, completion_only_loss=True)

    def run() -> Counts:
        dataset = datasets.load_dataset("json", data_files=str(folder / "trl.jsonl"), split="train")
        data = SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, config, True, None, "train")  # type: ignore[arg-type]
        ids, labels = data.data["input_ids"], data.data["labels"]
        trained = sum(int((chunk.flatten().to_numpy() != -100).sum()) for chunk in labels.chunks)
        return {"tokens": sum(len(chunk.flatten()) for chunk in ids.chunks), "trained": trained, "rows": len(data)}

    return run


CACHED, CACHED_2 = "ours, prepared before", "ours, 2 processes, prepared before"
CONTENDERS = {  # by their keys in the results file
    "ours": (qlora, 1),
    "TRL": (trl, 1),
    "ours, 2 processes": (qlora, 2),
    "TRL, 2 processes": (trl, 2),
    CACHED: (qlora, 1),
    CACHED_2: (qlora, 2),
}


def child(name: str, folder: Path) -> None:
    """One measurement, printed as a line of JSON."""
    build, processes = CONTENDERS[name]
    run = build(folder, processes)
    baseline = resident_bytes()
    started, cpu_before = time.perf_counter(), os.times()
    counts = run()
    seconds, cpu_after = time.perf_counter() - started, os.times()
    cpu_seconds = sum(cpu_after[:4]) - sum(cpu_before[:4])  # includes workers that have ended
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of the largest one, with what it shares
    peaks = {"peak_bytes": peak_bytes() - baseline, "worker_peak_bytes": max(0, workers - baseline)}
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, **peaks, **counts}))


def measured(name: str, folder: Path) -> dict[str, Any]:
    """One measurement in a new process, with empty caches except for CACHED and CACHED_2."""
    with tempfile.TemporaryDirectory() as empty:
        cache = str(folder / "kept") if name in (CACHED, CACHED_2) else empty
        paths = {"QLORA_CACHE": cache, "HF_DATASETS_CACHE": empty, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
        command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
        process = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{name}: {process.stderr[-2000:]}")
    return dict(json.loads(process.stdout.splitlines()[-1]))


def summary(rounds: list[dict[str, Any]], records: int) -> dict[str, Any]:
    """Medians, and every round's seconds."""
    median = {key: statistics.median(one[key] for one in rounds) for key in ("seconds", "cpu_seconds", "peak_bytes")}
    every = {f"all_{key}": [one[key] for one in rounds] for key in ("seconds", "cpu_seconds")}
    counts = {key: rounds[0][key] for key in ("tokens", "trained", "rows")}
    return {**median, **every, "rows_per_second": records / median["seconds"], "made": counts}


def main() -> None:
    """Measure all contenders in turn and write results/data.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--child")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), options.rows)
        records = len((Path(folder) / "qlora.jsonl").read_text().splitlines())
        measured(CACHED, Path(folder))  # fills the cache
        compared = [name for name in CONTENDERS if name != CACHED_2]
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in compared}
        for number in range(options.rounds):
            for name in compared if number % 2 == 0 else reversed(compared):
                results[name].append(measured(name, Path(folder)))
                print(f"round {number + 1}, {name}: {results[name][-1]}", flush=True)
    summaries = {name: summary(rounds, records) for name, rounds in results.items()}
    for name, medians in summaries.items():
        print(f"{name:24} {medians['seconds']:6.2f} s  cpu {medians['cpu_seconds']:6.2f} s  "
              f"peak +{medians['peak_bytes'] / 2**20:5.0f} MiB  {medians['made']}")  # fmt: skip
    print(write("data", {"rows": records, "max_length": MAX_LENGTH, "contenders": summaries}))


if __name__ == "__main__":
    main()
