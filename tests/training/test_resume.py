"""A run that was stopped and resumed equals the run that was never stopped, in every bit and every logged loss."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.small_runs import differing_tensors, metrics, run, write_records
from support.stopped_runs import COMBINATIONS, RECORDS, STEPS, ReferenceRun, Zoo, assert_same_run, signal_in_step

from qlora.errors import InputError, Stopped
from qlora.recipe.recipe import dump
from qlora.recipe.recipe import read as read_recipe
from qlora.runs.load_run import load_run
from qlora.training.checkpoint import MANIFEST, OPTIMIZER, POSITION
from qlora.utils.atomic_files import sha256_of, write_json


@pytest.mark.sample(of=6, every=("optimizer", "step"))
@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize("step", [1, 3, 5])
@pytest.mark.parametrize("optimizer", COMBINATIONS)
def test_resuming_gives_the_uninterrupted_run(
    reference_runs: Callable[[str], ReferenceRun], optimizer: str, step: int, tmp_path: Path
) -> None:
    reference = reference_runs(optimizer)
    moments = load_file(reference.output / "checkpoint-000006" / OPTIMIZER)
    assert any(value.dtype == torch.uint8 for value in moments.values()) == optimizer.endswith("8bit")
    output = reference.copy_until(step, tmp_path / "run")
    run(reference.recipe(output))
    assert_same_run(reference.output, output)


@pytest.mark.xdist_group("resume")
def test_running_twice_gives_the_same_run(reference_runs: Callable[[str], ReferenceRun], tmp_path: Path) -> None:
    reference = reference_runs("adamw")
    run(reference.recipe(tmp_path / "run"))
    assert_same_run(reference.output, tmp_path / "run")


@pytest.mark.xdist_group("resume")
def test_a_finished_run_keeps_its_result_when_started_again(
    reference_runs: Callable[[str], ReferenceRun], tmp_path: Path
) -> None:
    reference = reference_runs("paged_adamw_8bit")
    output = reference.copy_until(STEPS, tmp_path / "run")
    run(reference.recipe(output))
    assert_same_run(reference.output, output)


@pytest.mark.xdist_group("resume")
def test_a_named_checkpoint_may_be_in_another_folder(
    reference_runs: Callable[[str], ReferenceRun], tmp_path: Path
) -> None:
    reference = reference_runs("adamw")
    checkpoint = reference.output / "checkpoint-000002"
    run(reference.recipe(tmp_path / "run", f"train.resume={checkpoint}"))
    assert differing_tensors(reference.output, tmp_path / "run") == []
    with pytest.raises(InputError, match="manifest"):
        run(reference.recipe(tmp_path / "other", f"train.resume={tmp_path / 'nothing'}"))


@pytest.mark.xdist_group("resume")
def test_a_loss_line_over_several_steps_is_the_same_after_a_crash(
    reference_runs: Callable[[str], ReferenceRun], tmp_path: Path
) -> None:
    reference, options = reference_runs("adamw"), ("train.log_every=3", "train.save_every=2", "train.max_steps=4")
    run(reference.recipe(tmp_path / "uninterrupted", *options))
    crashed = Path(shutil.copytree(tmp_path / "uninterrupted", tmp_path / "run"))
    for folder in crashed.glob("checkpoint-*"):
        if folder.name != "checkpoint-000002":
            shutil.rmtree(folder)
    run(reference.recipe(crashed, *options))
    assert metrics(tmp_path / "uninterrupted") == metrics(crashed)


# ---- settings that may not change, and settings that may


@pytest.mark.sample(of=4)
@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optim.learning_rate=1e-3", "optim.learning_rate"),
        ("optim.betas=[0.8,0.99]", "optim.betas"),
        ("optim.weight_decay=0.1", "optim.weight_decay"),
        ("optim.max_grad_norm=1.0", "optim.max_grad_norm"),
        ("optim.loraplus_ratio=2", "optim.loraplus_ratio"),
        ("optim.kind=paged_adamw_32bit", "optim.kind"),
        ("optim.schedule=linear", "optim.schedule"),
        ("optim.warmup=4", "optim.warmup"),
        ("adapter.rank=2", "adapter.rank"),
        ("adapter.alpha=2", "adapter.alpha"),
        ("adapter.kind=rslora", "adapter.kind"),
        ("adapter.dropout=0.0", "adapter.dropout"),
        ("adapter.targets=[q_proj]", "adapter.targets"),
        ("quant.kind=fp4", "quant.kind"),
        ("quant.double=false", "quant.double"),
        ("train.seed=1", "train.seed"),
        ("train.global_batch=2", "train.global_batch"),
        ("data.packing=true", "data.packing"),
        ("data.max_length=60", "data.max_length"),
        ("data.train_on=all", "data.train_on"),
        ("data.eval_fraction=0.3", "data.eval_fraction"),
        ("model.dtype=bfloat16", "model.dtype"),
    ],
)
def test_a_change_that_affects_the_result_is_refused_with_its_key(
    reference_runs: Callable[[str], ReferenceRun], override: str, key: str, tmp_path: Path
) -> None:
    reference = reference_runs("adamw")
    output = reference.copy_until(3, tmp_path / "run")
    with pytest.raises(InputError) as caught:
        run(reference.recipe(output, override))
    assert key in str(caught.value) and "resume" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.xdist_group("resume")
def test_other_records_and_another_base_model_are_refused(
    reference_runs: Callable[[str], ReferenceRun], zoo: Zoo, tmp_path: Path
) -> None:
    reference = reference_runs("adamw")
    output = reference.copy_until(3, tmp_path / "run")
    data = write_records(tmp_path / "records.jsonl", RECORDS, seed=1)
    with pytest.raises(InputError, match="data sha256"):
        run(reference.recipe(output, f"data.train={data}"))
    with pytest.raises(InputError, match="base sha256"):
        run(reference.recipe(output, f"model.name={zoo('llama', seed=1)}"))


@pytest.mark.xdist_group("resume")
def test_settings_that_change_no_number_may_change(
    reference_runs: Callable[[str], ReferenceRun], zoo: Zoo, tmp_path: Path
) -> None:
    reference = reference_runs("adamw")
    output = reference.copy_until(3, tmp_path / "run")
    model = Path(shutil.copytree(zoo("llama"), tmp_path / "model"))
    data = shutil.copy(reference.data, tmp_path / "copy.jsonl")
    run(reference.recipe(output, f"model.name={model}", f"data.train={data}", "train.keep=2", "memory.recompute=none"))
    assert differing_tensors(reference.output, output) == []


@pytest.mark.xdist_group("resume")
def test_a_run_may_be_extended(reference_runs: Callable[[str], ReferenceRun], tmp_path: Path) -> None:
    reference = reference_runs("adamw")
    run(reference.recipe(tmp_path / "long", "train.max_steps=5", "optim.warmup=2"))
    run(reference.recipe(tmp_path / "run", "train.max_steps=3", "optim.warmup=2"))
    run(reference.recipe(tmp_path / "run", "train.max_steps=5", "optim.warmup=2"))
    assert differing_tensors(tmp_path / "long", tmp_path / "run") == []
    assert metrics(tmp_path / "long") == metrics(tmp_path / "run")


@pytest.mark.xdist_group("resume")
def test_resume_never_starts_a_new_run_that_is_then_resumed(
    reference_runs: Callable[[str], ReferenceRun], tmp_path: Path
) -> None:
    reference = reference_runs("adamw")
    output = reference.copy_until(5, tmp_path / "run")
    with signal_in_step(2), pytest.raises(Stopped):
        run(reference.recipe(output, "train.resume=never", "train.seed=9", "train.max_steps=3"))
    run(reference.recipe(output, "train.seed=9", "train.max_steps=3"))
    run(reference.recipe(tmp_path / "fresh", "train.seed=9", "train.max_steps=3"))
    assert differing_tensors(tmp_path / "fresh", output) == []


# ---- names of earlier versions


@pytest.mark.xdist_group("resume")
def test_a_run_resumes_under_the_old_name_of_its_optimizer(
    reference_runs: Callable[[str], ReferenceRun], tmp_path: Path
) -> None:
    reference = reference_runs("offloaded_adamw")
    output = reference.copy_until(3, tmp_path / "run")
    recipe_text = dump(reference.recipe(output)).replace("kind: offloaded_adamw", "kind: hosted_adamw")
    for folder in output.glob("checkpoint-*"):
        position = folder / POSITION
        position.write_text(position.read_text().replace('"offloaded_adamw"', '"hosted_adamw"'))
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"][POSITION] = sha256_of(position)
        write_json(folder / MANIFEST, manifest)
    assert json.loads(position.read_text())["fixed"]["optim.kind"] == "hosted_adamw"
    (tmp_path / "recipe.yaml").write_text(recipe_text)
    recipe, notes = read_recipe(tmp_path / "recipe.yaml")
    assert notes == ["read optim.kind: hosted_adamw as optim.kind: offloaded_adamw"]
    run(recipe)
    assert_same_run(reference.output, output)


@pytest.mark.xdist_group("resume")
def test_a_run_folder_with_the_old_name_of_its_optimizer_is_loaded(
    reference_runs: Callable[[str], ReferenceRun], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(reference_runs("offloaded_adamw").output, tmp_path / "run"))
    recipe_file = folder / "recipe.yaml"
    recipe_file.write_text(recipe_file.read_text().replace("kind: offloaded_adamw", "kind: hosted_adamw"))
    assert "kind: hosted_adamw" in recipe_file.read_text()
    assert load_run(str(folder)).recipe.optim.kind == "offloaded_adamw"
