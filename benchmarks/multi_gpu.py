"""Memory plan of one of two 24 GiB GPUs that train Llama 3.3 70B, for DDP and FSDP, as its recipe plans it.

`python benchmarks/multi_gpu.py` writes results/many_cards.json; every figure in it is predicted.
"""

import sys
from pathlib import Path
from typing import Any

from harness import write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.published_models import CONFIGS

from qlora.memory.planner.config_reader import shapes_of
from qlora.memory.planner.memory_plan import plan_summary
from qlora.recipe.planning import Machine, Planner, better_strategy
from qlora.recipe.recipe import read

ROOT = Path(__file__).parents[1]
RECIPE = "recipes/2x24gb-llama3.3-70b.yaml"
MODEL, GPU, GPUS, RAM = "Llama-3.1-70B", "24GiB", 2, "64GiB"  # Llama 3.3 has the same shapes


def planned() -> dict[str, Any]:
    """Both plans of the recipe, and which of them `auto` takes."""
    recipe = read(str(ROOT / RECIPE), ["distributed.kind=auto"])[0]
    plans = Planner(recipe, shapes_of(CONFIGS[MODEL], MODEL)).plan_strategies(Machine.described(GPU, GPUS, RAM))
    keys = ("owners", "peak_bytes", "host_bytes", "fits", "choice", "words", "peak_phase")
    full = {kind: plan.as_json() | {"words": plan_summary(plan)} for kind, plan in plans.items()}
    short = {kind: {key: plan[key] for key in keys} for kind, plan in full.items()}
    auto = better_strategy(plans)
    return {"kind": "predicted", "recipe": RECIPE, "card": GPU, "ram": RAM, "auto": auto, "plans": short}


if __name__ == "__main__":
    print(write("many_cards", planned()))
