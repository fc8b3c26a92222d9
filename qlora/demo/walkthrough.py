"""`qlora demo`: the very code of `qlora train`, eval and export on the embedded base, before and after side by side."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora.exporters.export_run import ExportRequest, export_run
from qlora.recipe.recipe import Recipe, read
from qlora.runs.evaluate_and_generate import answers
from qlora.runs.load_run import held_out, load_run
from qlora.runs.train import train
from qlora.training.exact_match import exact_match
from qlora.utils.atomic_files import write_json

DEMO = Path(__file__).parent
SHOWN = 4  # rows printed side by side
Answers = list[dict[str, str]]


def demonstrate(out: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Train, evaluate, merge and certify on the embedded base; returns the scores. QloraError if a promise fails."""
    started = time.monotonic()
    recipe = demo_recipe(out)
    say("1. the base, before any training")
    before = _ask(recipe.model.name, recipe)
    say("2. `qlora train`, on a base frozen in 4 bits")
    train(recipe)
    say("3. the same questions again")
    after = _ask(out, recipe)
    side_by_side(before, after)
    say(f"exact match on {len(after)} held-out rows: {score(before):.1%} before, {score(after):.1%} after")
    say("4. `qlora export --to merged`, and how far the merged model is from the trained one")
    order = ExportRequest(to="merged", onto="dequantized", dtype="float32", data=None, rows=None)
    exported = export_run(load_run(out, None, say), order, f"{out}/merged", say)
    say(f"5. what is in {out}")
    for file in sorted(path for path in Path(out).rglob("*") if path.is_file() and "checkpoint" not in str(path)):
        say(f"   {file.relative_to(out)!s:34} {file.stat().st_size / 1024:10,.1f} KiB")
    found = {
        "before": score(before),
        "after": score(after),
        "agreement": exported["agreement"],
        "seconds": time.monotonic() - started,
    }
    write_json(Path(out) / "demo.json", found)
    say(f'done in {found["seconds"]:.0f} s. Look at {out}/report.html, or go on: qlora generate {out} "..."')
    return found


def demo_recipe(out: str) -> Recipe:
    """The embedded recipe, its paths pointing into the installed package."""
    paths = [
        f"model.name={DEMO / 'base'}", f"data.train={DEMO / 'data' / 'train.jsonl'}",
        f"data.eval={DEMO / 'data' / 'eval.jsonl'}", f"train.output={out}", "train.resume=never",
    ]  # fmt: skip
    return read(DEMO / "recipe.yaml", paths)[0]


def score(rows: Answers) -> float:
    """The share of answers that are exactly right."""
    return sum(exact_match(row["answer"], row["reference"]) for row in rows) / max(1, len(rows))


def side_by_side(before: Answers, after: Answers) -> None:
    """A few held-out rows on the terminal: what was asked, what the base said, what the trained model says."""
    table = Table("asked", "before", "after", show_lines=True)
    for old, new in list(zip(before, after, strict=True))[:SHOWN]:
        table.add_row(old["prompt"], old["answer"][:120], new["answer"])
    Console(stderr=True, markup=False).print(table)


def _ask(name: str, recipe: Recipe) -> Answers:
    opened = load_run(name)
    return answers(opened, held_out(opened, recipe.data.eval[0].path if recipe.data.eval else None))
