"""Every recipe for a newer model fits the GPU in its name, by the plan of the model's published config.json."""

from pathlib import Path

import pytest
from support.documents import ROOT
from support.published_configs import NEW_CONFIGS

from qlora.memory.planner.config_reader import shapes_of
from qlora.recipe.planning import Machine, Planner
from qlora.recipe.recipe import from_mapping, read

MODELS = {  # a recipe's model -> its entry in NEW_CONFIGS, and GPUs in GiB that its comments name
    "8gb-qwen3.5-4b": ("Qwen3.5-4B", (8,)), "12gb-qwen3.5-9b": ("Qwen3.5-9B", (12,)),
    "24gb-qwen3.6-27b": ("Qwen3.6-27B", (24,)), "8gb-qwen3-30b-a3b": ("Qwen3-30B-A3B", (8, 16, 24)),
    "16gb-qwen3.6-35b-a3b": ("Qwen3.6-35B-A3B", (16, 24)), "12gb-gpt-oss-20b": ("gpt-oss-20b", (12, 16)),
    "8gb-gemma-4-e4b": ("Gemma-4-E4B", (8,)), "12gb-gemma-4-12b": ("Gemma-4-12B", (12,)),
    "16gb-gemma-4-26b-a4b": ("Gemma-4-26B-A4B", (16, 24)), "24gb-mistral-small": ("Mistral-Small-3.2-24B", (24,)),
    "24gb-glm-4.7-flash": ("GLM-4.7-Flash", (24,)),
}  # fmt: skip
RESIDENT = {  # GPUs where no layer streams
    "8gb-qwen3-30b-a3b": 24, "16gb-qwen3.6-35b-a3b": 24, "12gb-gpt-oss-20b": 16, "16gb-gemma-4-26b-a4b": 24,
}  # fmt: skip
CASES = [(file, gpu) for file, (_, gpus) in MODELS.items() for gpu in gpus]


@pytest.mark.parametrize(("file", "gpu"), CASES)
def test_a_recipe_fits_its_gpu(file: str, gpu: int) -> None:
    path: Path = ROOT / "recipes" / f"{file}.yaml"
    recipe = read(path)[0]
    name = MODELS[file][0]
    plan = Planner(recipe, shapes_of(NEW_CONFIGS[name], name)).plan(Machine.described(f"{gpu}GiB", ram="32GiB"))
    assert plan.fits, plan.advice
    assert plan.micro_batches == recipe.train.global_batch and plan.step_seconds > 0
    assert file.startswith(f"{gpu}gb") or f"--gpu {gpu}GiB" in path.read_text(encoding="utf-8")
    assert gpu != RESIDENT.get(file) or not plan.work.streamed


@pytest.mark.parametrize(
    ("name", "overrides", "rows"),
    [
        ("Mistral-Small-3.2-24B", (), 1),  # a prefix tree
        ("Mistral-Small-3.2-24B", ("model.attention=sdpa",), 2),
        ("Mistral-Small-3.2-24B", ("model.attention=sdpa", "data.packing=true"), 1),  # documents of one sequence
        ("Mistral-Small-3.2-24B", ("model.attention=sdpa", "objective.kind=sft"), 1),
        ("Qwen3.5-4B", (), 2),  # recurrent layers train no trees
    ],
)
def test_a_pair_that_is_no_tree_counts_as_two_rows(name: str, overrides: tuple[str, ...], rows: int) -> None:
    sections = {"model": name, "data": {"train": "r", "packing": False}, "objective": {"kind": "dpo"}}
    recipe = from_mapping(sections, overrides=overrides)[0]
    work = Planner(recipe, shapes_of(NEW_CONFIGS[name], name)).plan(Machine.described("80GiB", ram="64GiB")).work
    assert work.tokens == rows * recipe.train.micro_batch * recipe.data.max_length
