"""Llama 3.3 70B on two 24 GiB cards as its recipe plans it, each way to share: what takes the room of one card.

`python benchmarks/many_cards.py` writes results/many_cards.json; every figure in it is predicted.
"""

import sys
from pathlib import Path
from typing import Any

from bench import write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.published_models import CONFIGS

from qlora.memory.planner.config_reader import shapes_of
from qlora.recipe.planning import better, elsewhere, in_words, plans_for
from qlora.recipe.recipe import read

ROOT = Path(__file__).parents[1]
RECIPE = "recipes/2x24gb-llama3.3-70b.yaml"
MODEL, CARD, CARDS, RAM = "Llama-3.1-70B", "24GiB", 2, "64GiB"  # of 3.3's shapes


def planned() -> dict[str, Any]:
    """Both plans of the recipe, and which of them `auto` takes."""
    recipe = read(str(ROOT / RECIPE), ["distributed.kind=auto"])[0]
    plans = plans_for(recipe, shapes_of(CONFIGS[MODEL], MODEL), elsewhere(CARD, CARDS, RAM))
    found = {kind: plan.as_json() | {"words": in_words(plan)} for kind, plan in plans.items()}
    kept = ("owners", "peak_bytes", "host_bytes", "fits", "choice", "words", "peak_phase")
    rows = {kind: {key: plan[key] for key in kept} for kind, plan in found.items()}
    return {"kind": "predicted", "recipe": RECIPE, "card": CARD, "ram": RAM, "auto": better(plans), "plans": rows}


if __name__ == "__main__":
    print(write("many_cards", planned()))
