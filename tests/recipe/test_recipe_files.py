"""The recipes that come along, the page of defaults, the launcher configurations, and how they are packed."""

import json
import resource
import subprocess
import sys
import tomllib

import pytest
from support.paths import ROOT

from qlora.config import parse
from qlora.data import Source
from qlora.recipe.recipe import SECTIONS, dump, from_mapping, read, recipes_folder

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
LAUNCHERS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
REFERENCE = ROOT / "recipes" / "reference.yaml"


def test_the_recipes_are_found_from_the_code():
    assert recipes_folder().samefile(ROOT / "recipes")
    assert len(RECIPES) > 12


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_reads(file):
    assert read(file)[1] == []


@pytest.mark.parametrize("file", [each for each in RECIPES if each != REFERENCE], ids=lambda file: file.stem)
def test_a_recipe_is_one_screen_and_shows_only_what_differs_from_the_defaults(file):
    assert len(file.read_text().splitlines()) <= 40
    recipe, _ = read(file)
    least, _ = from_mapping({"model": recipe.model.name, "data": {"train": "data/train.jsonl"}})
    defaults = parse(dump(least), "defaults").value
    written = parse(file.read_text(), str(file)).value
    for name, section in written.items():
        if isinstance(section, dict):
            same = [key for key, value in section.items() if value == defaults[name][key] and key != "train"]
            assert not same, f"{file.name}: {name}.{same} is the default"


def test_the_reference_is_every_setting_with_its_default():
    recipe, _ = read(REFERENCE)
    least, _ = from_mapping({"model": recipe.model.name, "data": {"train": "data/train.jsonl"}})
    assert recipe == least
    written = parse(REFERENCE.read_text(), "reference").value
    for name, section in SECTIONS.items():
        assert list(written[name]) == list(section.model_fields)
    assert list(written["data"]["train"][0]) == list(Source.model_fields)


def test_the_reference_has_each_setting_s_own_words():
    comments = [line.split("# ", 1)[1] for line in REFERENCE.read_text().splitlines()[1:] if "# " in line]
    fields = []
    for name, section in SECTIONS.items():
        for key, field in section.model_fields.items():
            fields.append(field.description)
            if (name, key) == ("data", "train"):
                fields += [each.description for each in Source.model_fields.values()]
    assert [each for each in comments if each in fields] == fields


def test_guanaco_is_the_paper_s():
    sizes = {"7b": (2e-4, 0.1), "13b": (2e-4, 0.1), "33b": (1e-4, 0.05), "65b": (1e-4, 0.05)}
    for size, (learning_rate, dropout) in sizes.items():
        recipe, _ = read(ROOT / "recipes" / f"guanaco-{size}.yaml")
        assert (recipe.optim.learning_rate, recipe.adapter.dropout) == (learning_rate, dropout)
        assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.kind) == (64, 16, "lora")
        assert (recipe.quant.kind, recipe.quant.double, recipe.quant.block) == ("nf4", True, 64)
        assert (recipe.optim.kind, recipe.optim.schedule) == ("paged_adamw_32bit", "constant")
        assert (recipe.optim.max_grad_norm, recipe.optim.betas) == (0.3, (0.9, 0.999))
        assert (recipe.train.global_batch, recipe.train.max_steps, recipe.data.max_length) == (16, 1875, 512)


@pytest.mark.parametrize("file", LAUNCHERS, ids=lambda file: file.stem)
def test_accelerate_reads_every_launcher_configuration(file):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert str(config.mixed_precision) == "no"
    assert (config.fsdp_config or {"fsdp_version": 2})["fsdp_version"] == 2


def test_the_launcher_configurations_are_the_five():
    assert [file.stem for file in LAUNCHERS] == ["ddp", "fsdp", "fsdp_offload", "multi_node", "single"]


def test_everything_is_packed():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "qlora").rglob("*.py")}
    assert set(tool["packages"]) >= rooms | {"qlora.recipes"}
    assert tool["package-dir"] == {"qlora.recipes": "recipes"}


def processor_seconds() -> float:
    """Of all children that have ended: what a busy machine adds to the clock is left out."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_reading_a_recipe_imports_no_torch_and_is_quick():
    code = (
        "import json, sys, qlora.recipe.recipe; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    seconds = []
    for _ in range(3):
        start = processor_seconds()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        seconds.append(processor_seconds() - start)
    heavy = {"torch", "transformers", "numpy", "accelerate", "datasets", "bitsandbytes", "safetensors"}
    assert not heavy & set(json.loads(done.stdout))
    assert min(seconds) < 0.7  # 0.25 measured alone; a busy core's caches make it slower
