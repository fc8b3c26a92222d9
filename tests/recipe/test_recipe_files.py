"""The included recipes, the reference of all settings, the launcher configurations, and their packaging."""

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


@pytest.mark.parametrize("file", [file for file in RECIPES if file != REFERENCE], ids=lambda file: file.stem)
def test_a_recipe_is_one_screen_and_has_no_default_settings(file):
    assert len(file.read_text().splitlines()) <= 40
    recipe, _ = read(file)
    minimal, _ = from_mapping({"model": recipe.model.name, "data": {"train": "data/train.jsonl"}})
    defaults = parse(dump(minimal), "defaults").value
    written = parse(file.read_text(), str(file)).value
    for name, section in written.items():
        if isinstance(section, dict):
            same = [key for key, value in section.items() if value == defaults[name][key] and key != "train"]
            assert not same, f"{file.name}: {name}.{same} is the default"


def test_the_reference_is_every_setting_with_its_default():
    recipe, _ = read(REFERENCE)
    minimal, _ = from_mapping({"model": recipe.model.name, "data": {"train": "data/train.jsonl"}})
    assert recipe == minimal
    written = parse(REFERENCE.read_text(), "reference").value
    for name, section in SECTIONS.items():
        assert list(written[name]) == list(section.model_fields)
    assert list(written["data"]["train"][0]) == list(Source.model_fields)


def test_the_reference_has_the_documentation_of_each_setting():
    comments = [line.split("# ", 1)[1] for line in REFERENCE.read_text().splitlines()[1:] if "# " in line]
    documentation = []
    for name, section in SECTIONS.items():
        for key, field in section.model_fields.items():
            documentation.append(field.description)
            if (name, key) == ("data", "train"):
                documentation += [source.description for source in Source.model_fields.values()]
    assert [comment for comment in comments if comment in documentation] == documentation


def test_guanaco_has_the_settings_of_the_paper():
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


def test_there_are_five_launcher_configurations():
    assert [file.stem for file in LAUNCHERS] == ["ddp", "fsdp", "fsdp_offload", "multi_node", "single"]


def test_every_package_is_in_the_wheel():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "qlora").rglob("*.py")}
    assert set(tool["packages"]) >= packages | {"qlora.recipes"}
    assert tool["package-dir"] == {"qlora.recipes": "recipes"}


def processor_seconds() -> float:
    """Of all finished child processes. Unlike the clock, it does not grow on a busy machine."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_reading_a_recipe_imports_no_torch_and_is_quick():
    code = (
        "import json, sys, qlora.recipe.recipe; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    seconds = []
    for _ in range(3):
        start = processor_seconds()
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        seconds.append(processor_seconds() - start)
    heavy = {"torch", "transformers", "numpy", "accelerate", "datasets", "bitsandbytes", "safetensors"}
    assert not heavy & set(json.loads(result.stdout))
    assert min(seconds) < 0.7  # 0.25 measured on an idle machine; a busy core's caches make it slower
