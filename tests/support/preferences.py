"""Preference pairs and labeled answers on disk, of one word more than needed, and jobs that train them."""

import json
import random
from pathlib import Path

from qlora.training.job import Job
from support.small_runs import WORDS
from support.step_gradients import job_of

PAIRED, PAIRS = ("dpo", "ipo", "orpo", "simpo"), 6


def write_pairs(path: Path, count: int = PAIRS, seed: int = 0) -> Path:
    """Prompts of one to six words with a chosen and a rejected answer of different lengths, one pair per line."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            prompt, chosen, rejected = (
                " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 6)))
                for _ in ("prompt", "chosen", "rejected")
            )
            record = {"prompt": f"{number} {prompt}", "chosen": f"{chosen} yes", "rejected": f"{rejected} no"}
            file.write(json.dumps(record) + "\n")
    return path


def write_feedback(path: Path, count: int = PAIRS, seed: int = 0) -> Path:
    """Prompts with one answer and a label: true for every second one."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            prompt, answer = (" ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 6))) for _ in "ab")
            record = {"prompt": f"{number} {prompt}", "completion": answer, "label": number % 2 == 0}
            file.write(json.dumps(record) + "\n")
    return path


def write_answers(kind: str, path: Path, count: int = PAIRS) -> Path:
    """The records that an objective compares."""
    return write_feedback(path, count) if kind == "kto" else write_pairs(path, count)


def comparison_job(model: Path, folder: Path, kind: str, *overrides: str) -> Job:
    """A job of one step over PAIRS pairs or answers, with random adapters."""
    data = write_answers(kind, folder / f"{kind}.jsonl")
    return job_of(model, folder, f"objective.kind={kind}", "quant.kind=dense", *overrides, records=PAIRS, data=data)
