"""A planted preference is learned on the demo's base: polite answers over rude ones, whatever is asked."""

import json
import random
from pathlib import Path

import pytest
from support.small_runs import metrics, run

from qlora.demo.walkthrough import DEMO
from qlora.recipe.recipe import from_mapping
from qlora.runs.evaluate import evaluate_run
from qlora.runs.load_run import load_run

PAIRS = 240


def write_sums(path: Path) -> Path:
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(PAIRS):
            a, b = draw.randint(1, 99), draw.randint(1, 99)
            answer = f"The sum is {a + b}."
            pair = {"chosen": f"{answer} Thank you.", "rejected": f"{answer} Go away."}
            file.write(json.dumps({"prompt": f"What is {a} plus {b}?", **pair}) + "\n")
    return path


@pytest.mark.slow
def test_a_planted_preference_is_learned(tmp_path: Path) -> None:
    recipe, _ = from_mapping(
        {
            "model": {"name": str(DEMO / "base"), "dtype": "float32"},
            "data": {"train": str(write_sums(tmp_path / "pairs.jsonl")), "eval_fraction": 0.1, "max_length": 128},
            "objective": {"kind": "dpo", "sft_weight": 0.2},
            "optim": {"kind": "adamw", "learning_rate": 5e-4},
            "train": {
                "output": str(tmp_path / "run"),
                "max_steps": 24,
                "micro_batch": 4,
                "global_batch": 8,
                "eval_every": 8,
            },
        }
    )
    run(recipe)
    evaluations = metrics(tmp_path / "run", "eval")
    assert evaluations[-1]["eval_accuracy"] == 1.0
    margins = [line["eval_margin"] for line in evaluations]
    assert margins[0] == pytest.approx(0, abs=1e-6) and margins == sorted(margins) and margins[-1] > 1
    measured = evaluate_run(load_run(str(tmp_path / "run"), None), None, "loss", beside_base=True)
    assert measured["loss"] <= 1.1 * measured["base"]["loss"]  # of the chosen answers
    assert measured["forgetting"]["loss"] <= 1.1 * measured["forgetting"]["base_loss"]  # of other texts
