"""Comma lists and files of variants become recipes, each the one that a run alone would read."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora.errors import InputError
from qlora.recipe.recipe import dump, read
from qlora.runs.sweep.variants import split_values, variants_of

VALUES = st.text(alphabet="abc019.-+e_", min_size=1, max_size=8) | st.sampled_from(
    ["[q_proj, v_proj]", "{a: 1, b: 2}", "'a,b'", '"x, y"', "(?:a|b){1,2}"]
)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: owner/model\ndata: {train: records.jsonl}\nadapter: {rank: 4}\ntrain: {output: runs/x}\n")
    return str(path)


@given(st.lists(VALUES, min_size=1, max_size=5))
def test_a_comma_list_is_split_into_its_values(values: list[str]) -> None:
    assert split_values(",".join(values)) == values
    assert split_values(", ".join(values)) == values


def test_lists_make_a_grid_named_after_its_values(recipe: str) -> None:
    arguments = ("adapter.rank=8,16", "--optim.learning-rate", "1e-4,2e-4,3e-4", "train.max_steps=5")
    variants = variants_of(recipe, arguments)
    assert len(variants) == 6 and len({variant.name for variant in variants}) == 6
    assert variants[0].name == "rank-8_learning_rate-1e-4"
    assert variants[5].settings == {"adapter.rank": "16", "optim.learning_rate": "3e-4"}
    assert all(variant.recipe.train.max_steps == 5 for variant in variants)


def test_each_recipe_is_the_one_that_a_run_alone_would_read(recipe: str) -> None:
    for variant in variants_of(recipe, ("adapter.rank=8,16", "adapter.targets=[q_proj,v_proj],all-linear")):
        overrides = [f"{key}={value}" for key, value in variant.settings.items()]
        expected, _ = read(recipe, [*overrides, f"train.output=runs/x/{variant.name}"])
        assert dump(expected) == dump(variant.recipe) and expected == variant.recipe


def test_a_file_names_its_variants_and_is_one_more_axis(recipe: str, tmp_path: Path) -> None:
    file = tmp_path / "variants.yaml"
    file.write_text("small: {adapter.rank: 2}\nlarge:\n  adapter: {rank: 64, alpha: 128}\n  optim.kind: adamw\n")
    variants = variants_of(recipe, ("train.seed=1,2",), str(file), "runs/y")
    assert [variant.name for variant in variants] == ["small_seed-1", "small_seed-2", "large_seed-1", "large_seed-2"]
    assert variants[2].recipe.adapter.alpha == 128 and variants[2].recipe.train.output == "runs/y/large_seed-1"
    assert variants[0].recipe.adapter.alpha == read(recipe)[0].adapter.alpha


def test_settings_of_the_same_name_are_labeled_by_their_full_keys(recipe: str) -> None:
    variants = variants_of(recipe, ("adapter.kind=lora,dora", "optim.kind=adamw,adamw_8bit"))
    assert variants[0].name == "adapter.kind-lora_optim.kind-adamw"


REFUSED = {
    "nothing to sweep": ("train.seed=1",),
    "empty value": ("adapter.rank=8,",),
    "two variants are called": ("adapter.rank=8,8",),
    "are the same run": ("optim.learning_rate=1e-4,0.0001",),
    "quant.kind: 'fp4' in kind-fp4, 'nf4' in kind-nf4": ("quant.kind=nf4,fp4",),
    "model.name": ("model.name=a/b,c/d",),
    "memory.recompute": ("memory.recompute=all,none",),
    "train.deterministic": ("train.deterministic=true,false",),
    "train.output: each variant": ("train.output=a,b",),
    "distributed.kind: fsdp": ("distributed.kind=fsdp", "adapter.rank=1,2"),
    "train.compile": ("train.compile=true", "adapter.rank=1,2"),
    "train.resume": ("train.resume=runs/x/checkpoint-000001", "adapter.rank=1,2"),
    "train.report_to: wandb": ("train.report_to=[wandb]", "adapter.rank=1,2"),
    "full": ("adapter={kind: full}", "quant={kind: dense}", "train.seed=1,2"),
    "adapter.save_modules": ("adapter.save_modules=[lm_head]", "train.seed=1,2"),
    "adapter.new_tokens": ("adapter.new_tokens=[<a>]", "train.seed=1,2"),
    "adapter.rnak: not a setting": ("adapter.rnak=1,2",),
    "adapter.rank: found 'x'": ("adapter.rank=x,2",),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_settings_that_can_not_be_swept_are_refused_with_their_key(recipe: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        variants_of(recipe, REFUSED[reason])
    assert reason in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "allowed: lines of"),
        ("[1]", "allowed: lines of"),
        ("a: 1", "a: allowed: the settings of this variant"),
        ("'../a': {adapter.rank: 1}", "a folder's name"),
        ("a: {adapter.rank: 1}\na: {adapter.rank: 2}", "written twice"),
        ("a: {adapter.rnak: 1}", "variants.yaml:1: a.adapter.rnak: not a setting"),
        ("a: {adapter.rank: 1}\nb: {adapter: {rank: many}}", "variants.yaml:2: b.adapter.rank: found 'many'"),
        ("a: {train.output: b}", "train.output: each variant"),
    ],
)
def test_a_mistake_in_a_file_is_reported_with_its_line(recipe: str, tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "variants.yaml"
    file.write_text(content)
    with pytest.raises(InputError) as caught:
        variants_of(recipe, (), str(file))
    assert reason in str(caught.value)


@given(st.dictionaries(st.sampled_from(["adapter.rank", "train.seed", "optim.warmup"]), st.integers(1, 9), min_size=1))
def test_values_of_a_file_are_not_changed(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, int]) -> None:
    folder = tmp_path_factory.mktemp("files")
    path, file = folder / "recipe.yaml", folder / "variants.yaml"
    path.write_text("model: owner/model\ndata: {train: records.jsonl}\n")
    file.write_text(json.dumps({"one": settings}))
    (variant,) = variants_of(str(path), (), str(file))
    for key, value in settings.items():
        section, name = key.split(".")
        assert getattr(getattr(variant.recipe, section), name) == value
