"""`qlora demo`: train, evaluate and export the embedded model with the code of those commands, and compare answers."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora.exporters import ExportRequest
from qlora.exporters.export_run import export_run
from qlora.recipe.recipe import Recipe, read
from qlora.runs.evaluate import answer_examples
from qlora.runs.load_run import held_out_examples, load_run
from qlora.runs.train import train
from qlora.training.exact_match import exact_match
from qlora.utils.atomic_files import write_json

DEMO = Path(__file__).parent
SHOWN = 4  # answers in the table
Answers = list[dict[str, str]]


def run_demo(out: str, log: Callable[[str], None]) -> dict[str, Any]:
    """Train, evaluate, merge and certify the embedded model; returns the scores. QloraError if a step fails."""
    started = time.monotonic()
    recipe = demo_recipe(out)
    log("1. answers of the base model, before training")
    before = _answers(recipe.model.name, recipe)
    log("2. `qlora train`, on a base model frozen in 4 bits")
    train(recipe)
    log("3. answers to the same questions after training")
    after = _answers(out, recipe)
    print_comparison(before, after)
    log(f"exact match on {len(after)} held-out examples: {score(before):.1%} before, {score(after):.1%} after")
    log("4. `qlora export --to merged`, and the difference between the merged and the trained model")
    request = ExportRequest(to="merged", dtype="float32")
    exported = export_run(load_run(out, None, log), request, f"{out}/merged", log)
    log(f"5. files in {out}")
    for file in sorted(path for path in Path(out).rglob("*") if path.is_file() and "checkpoint" not in str(path)):
        log(f"   {file.relative_to(out)!s:34} {file.stat().st_size / 1024:10,.1f} KiB")
    result = {
        "before": score(before),
        "after": score(after),
        "agreement": exported["agreement"],
        "seconds": time.monotonic() - started,
    }
    write_json(Path(out) / "demo.json", result)
    log(f'done in {result["seconds"]:.0f} s. See {out}/report.html, or continue with: qlora generate {out} "..."')
    return result


def demo_recipe(out: str) -> Recipe:
    """The embedded recipe with the paths of the installed package."""
    overrides = [
        f"model.name={DEMO / 'base'}", f"data.train={DEMO / 'data' / 'train.jsonl'}",
        f"data.eval={DEMO / 'data' / 'eval.jsonl'}", f"train.output={out}", "train.resume=never",
    ]  # fmt: skip
    return read(DEMO / "recipe.yaml", overrides)[0]


def score(answers: Answers) -> float:
    """The share of answers that match the reference exactly."""
    return sum(exact_match(row["answer"], row["reference"]) for row in answers) / max(1, len(answers))


def print_comparison(before: Answers, after: Answers) -> None:
    """A table of a few held-out prompts with the answers before and after training."""
    table = Table("prompt", "before", "after", show_lines=True)
    for old, new in list(zip(before, after, strict=True))[:SHOWN]:
        table.add_row(old["prompt"], old["answer"][:120], new["answer"])
    Console(stderr=True, markup=False).print(table)


def _answers(name: str, recipe: Recipe) -> Answers:
    run = load_run(name)
    return answer_examples(run, held_out_examples(run, recipe.data.eval[0].path if recipe.data.eval else None))
