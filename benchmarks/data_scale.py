"""Preparing up to a million short conversations, beside TRL: python benchmarks/data_scale.py [--rows N,N].

Every measurement is a process of its own with two worker processes, contenders in turn, as in data_preparation.py. Of
each size: time, processor time, memory of the process and of its largest worker, and the time of a second start. A size
is kept in results/data_scale.json until it is measured again; `--draw` draws docs/data_scale.svg from that file alone.
"""

import argparse
import json
import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_preparation import CACHED_2, SHARED, measured, save_tokenizer, write_conversations
from harness import RESULTS, write
from plot_data_scale import OURS, TRL, draw_file

ROWS, TRL_ROWS = (20_000, 50_000, 200_000), 200_000

_SHORT = range(20, 200)  # characters of a sentence that is used


def conversations(count: int) -> Iterator[tuple[str, str]]:
    """A sentence of a question of GSM8K with a line of an answer, both drawn at random: about 52 tokens."""
    lines = [json.loads(line) for line in (SHARED / "gsm8k" / "train.jsonl").read_text().splitlines()]
    questions = sorted({text for line in lines for text in re.split(r"(?<=[.?!]) ", line["question"])})
    answers = sorted({text for line in lines for text in line["answer"].splitlines()})
    questions, answers = ([text for text in texts if len(text) in _SHORT] for texts in (questions, answers))
    draw = random.Random(0)
    for _ in range(count):
        yield draw.choice(questions), draw.choice(answers)


def measure(rows: int, with_trl: bool, kept: dict[str, Any]) -> dict[str, Any]:
    """The measurements of one size. kept: those of a contender that is not measured now."""
    results = dict(kept)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_conversations(folder, conversations(rows))
        save_tokenizer(folder)
        bytes_read = (folder / "qlora.jsonl").stat().st_size
        for contender in (CACHED_2, TRL) if with_trl else (CACHED_2,):
            results[contender] = measured(contender, folder)
            print(f"{rows:,} {contender}: {results[contender]}", flush=True)
        second = measured(CACHED_2, folder)
        print(f"{rows:,} second start: {second}", flush=True)
    results[OURS] = results.pop(CACHED_2)  # measured while its cache was empty
    return {**results, "file_bytes": bytes_read, "second_start": second}


def main() -> None:
    """Measure the sizes asked for, keep the others, and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--trl-rows", type=int, default=TRL_ROWS, help="the largest size at which TRL is measured")
    parser.add_argument("--draw", action="store_true", help="draw the plot and measure nothing")
    options = parser.parse_args()
    path = RESULTS / "data_scale.json"
    for rows in [] if options.draw else map(int, options.rows.split(",")):
        sizes = json.loads(path.read_text())["sizes"] if path.exists() else {}
        sizes[str(rows)] = measure(rows, rows <= options.trl_rows, sizes.get(str(rows), {}))
        write("data_scale", {"processes": 2, "sizes": dict(sorted(sizes.items(), key=lambda item: int(item[0])))})
    draw_file(path)


if __name__ == "__main__":
    main()
