"""Preparing GSM8K, from a JSONL file to packed rows, against TRL on the same rows: python benchmarks/data.py.

Every measurement is a process of its own, contenders in turn; the clock starts when libraries are imported and the
tokenizer is loaded. Both write their caches. Ours: read, check, render, prove the masks, gate, split, pack, keep.
TRL's: datasets' JSON reader and what SFTTrainer does before its first step. Writes results/data.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench import peak_bytes, resident_bytes, write

SHARED = Path(__file__).parents[2] / "shared" / "data"
MAX_LENGTH = 2_048
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Counts = dict[str, int]


def make_inputs(folder: Path, rows: int | None) -> None:
    """GSM8K as conversations in the spelling of each contender, and GPT-2's tokenizer with ChatML."""
    from transformers import PreTrainedTokenizerFast

    lines = (SHARED / "gsm8k" / "train.jsonl").read_text().splitlines()[:rows]
    with (folder / "ours.jsonl").open("w") as ours, (folder / "trl.jsonl").open("w") as trl:
        for line in map(json.loads, lines):
            asked = {"role": "user", "content": line["question"]}
            said = {"role": "assistant", "content": line["answer"]}
            ours.write(json.dumps({"messages": [asked, said]}) + "\n")
            trl.write(json.dumps({"prompt": [asked], "completion": [said]}) + "\n")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(SHARED / "tokenizers" / "gpt2" / "tokenizer.json"), eos_token="<|im_end|>",
        pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "tokenizer")


def ours(folder: Path, processes: int) -> Callable[[], Counts]:
    """qlora.data, as `qlora train` calls it."""
    from transformers import AutoTokenizer

    from qlora.data import Data
    from qlora.data.conversations import worker_pool
    from qlora.data.conversations.encoder import Encoder
    from qlora.data.prepare import prepare
    from qlora.data.types import trained_tokens

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core
    worker_pool.available = lambda: processes
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    section = Data.model_validate(
        {"train": str(folder / "ours.jsonl"), "max_length": MAX_LENGTH, "eval_fraction": 0, "packing": True}
    )

    def run() -> Counts:
        made = prepare(section, Encoder(tokenizer), 0)
        return {"tokens": made.report.tokens, "trained": trained_tokens(made.train), "rows": len(made.train)}

    return run


def trl(folder: Path, processes: int) -> Callable[[], Counts]:
    """TRL's own preparation, called as its trainer calls it."""
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    several = processes if processes > 1 else None
    config = SFTConfig(
        output_dir=str(folder / "out"), packing=True, max_length=MAX_LENGTH, report_to=[], use_cpu=True, bf16=False,
        dataset_num_proc=several,
    )  # fmt: skip
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=tokenizer.chat_template, completion_only_loss=True)

    def run() -> Counts:
        read = datasets.load_dataset("json", data_files=str(folder / "trl.jsonl"), split="train")
        made = SFTTrainer._prepare_dataset(trainer, read, tokenizer, config, True, None, "train")  # type: ignore[arg-type]
        ids, labels = made.data["input_ids"], made.data["labels"]
        trained = sum(int((chunk.flatten().to_numpy() != -100).sum()) for chunk in labels.chunks)
        return {"tokens": sum(len(chunk.flatten()) for chunk in ids.chunks), "trained": trained, "rows": len(made)}

    return run


CONTENDERS = {
    "ours": (ours, 1),
    "TRL": (trl, 1),
    "ours, 2 processes": (ours, 2),
    "TRL, 2 processes": (trl, 2),
    "ours, prepared before": (ours, 1),
}


def child(name: str, folder: Path) -> None:
    """One measurement, as a line of JSON."""
    build, processes = CONTENDERS[name]
    run = build(folder, processes)
    baseline = resident_bytes()
    started, cpu = time.perf_counter(), os.times()
    counts = run()
    seconds, spent = time.perf_counter() - started, os.times()
    used = sum(spent[:4]) - sum(cpu[:4])  # workers that have ended are in it
    print(json.dumps({"seconds": seconds, "cpu_seconds": used, "peak_bytes": peak_bytes() - baseline, **counts}))


def measured(name: str, folder: Path) -> dict[str, Any]:
    """A fresh process with empty caches, unless the name says otherwise."""
    kept = folder / "kept"
    with tempfile.TemporaryDirectory() as fresh:
        home = str(kept) if name.endswith("before") else fresh
        places = {"QLORA_CACHE": home, "HF_DATASETS_CACHE": fresh, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
        command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
        made = subprocess.run(command, env=os.environ | places, capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(f"{name}: {made.stderr[-2000:]}")
    return dict(json.loads(made.stdout.splitlines()[-1]))


def summary(found: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    """Medians, and every round's seconds."""
    median = {key: statistics.median(one[key] for one in found) for key in ("seconds", "cpu_seconds", "peak_bytes")}
    each = {"all_seconds": [one["seconds"] for one in found], "all_cpu_seconds": [one["cpu_seconds"] for one in found]}
    counts = {key: found[0][key] for key in ("tokens", "trained", "rows")}
    return {**median, **each, "rows_per_second": rows / median["seconds"], "made": counts}


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
        rows = len((Path(folder) / "ours.jsonl").read_text().splitlines())
        measured("ours, prepared before", Path(folder))  # fills the cache
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
        for number in range(options.rounds):
            for name in list(CONTENDERS) if number % 2 == 0 else reversed(list(CONTENDERS)):
                found[name].append(measured(name, Path(folder)))
                print(f"round {number + 1}, {name}: {found[name][-1]}", flush=True)
    summaries = {name: summary(each, rows) for name, each in found.items()}
    for name, each in summaries.items():
        print(f"{name:24} {each['seconds']:6.2f} s  cpu {each['cpu_seconds']:6.2f} s  "
              f"peak +{each['peak_bytes'] / 2**20:5.0f} MiB  {each['made']}")  # fmt: skip
    print(write("data", {"rows": rows, "max_length": MAX_LENGTH, "contenders": summaries}))


if __name__ == "__main__":
    main()
