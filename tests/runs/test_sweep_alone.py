"""Each run of a sweep equals the same run alone, in every bit; a failure in one variant does not affect the others."""

import json
import signal
from pathlib import Path

import pytest
from support.small_runs import differing_tensors, metrics
from support.stopped_runs import signal_in_step
from support.sweeps import Sweep, Zoo, nan_gradient
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from qlora.adapters.lora import LoraLinear
from qlora.errors import InputError, QloraError, Stopped
from qlora.utils.atomic_files import sha256_of, write_json

SAVING = ("train.save_every=2", "data.eval_fraction=0.2", "train.eval_every=3", "train.max_steps=4")
# Everything that may differ between variants, each in some of them.
DIFFERENT = {
    "plain": {"adapter.rank": 2},
    "seed": {"train.seed": 5, "data.order": "length", "optim.schedule": "cosine"},
    "dora": {"adapter": {"kind": "dora", "dropout": 0.2}, "optim.learning_rate": 1e-3},
    "pissa": {"adapter.init": "pissa", "adapter.alpha": 3.0, "optim": {"kind": "paged_adamw_32bit"}},
    "narrow": {"adapter.targets": ["q_proj", "down_proj"], "adapter.kind": "rslora", "optim.loraplus_ratio": 4},
    "packed": {"data.packing": True, "train.global_batch": 2, "train.micro_batch": 1},
    "short": {"train.max_steps": 2, "optim.weight_decay": 0.1, "train.log_every": 2},
    "eights": {"adapter.rank": 64, "optim.kind": "adamw_8bit", "train.epochs": 1.5, "train.max_steps": None},
}


GROUPS = (("plain", "seed"), ("dora", "pissa"), ("narrow", "packed"), ("short", "eights"))


@pytest.mark.sample(of=4)
@pytest.mark.xdist_group("sweep")
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "group",
    [*GROUPS, pytest.param((*DIFFERENT,), marks=pytest.mark.slow)],
    ids=lambda group: group[0] + str(len(group)),
)
def test_every_variant_equals_its_run_alone(zoo: Zoo, tmp_path: Path, dtype: str, group: tuple[str, ...]) -> None:
    variants = {name: DIFFERENT[name] for name in group}
    sweep = Sweep(zoo("llama"), tmp_path, *SAVING, f"model.dtype={dtype}")
    result = sweep.train_together(file=variants)
    assert result.failure is None
    names = sweep.train_alone(file=variants)
    assert names == [*group] and sorted(sum(GROUPS, ())) == sorted(DIFFERENT)
    sweep.assert_same_runs(names)


@pytest.mark.sample(of=4)
@pytest.mark.xdist_group("sweep")
@pytest.mark.parametrize("policy", [("memory.recompute=all",), ("memory.weights=stream", "model.dtype=float16")])
def test_every_variant_equals_its_run_alone_under_any_policy(zoo: Zoo, tmp_path: Path, policy: tuple[str, ...]) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, *policy, "adapter.dropout=0.2", "train.max_steps=3")
    sweep.train_together("adapter.kind=lora,dora")
    sweep.assert_same_runs(sweep.train_alone("adapter.kind=lora,dora"))


@pytest.mark.sample(of=6)
@pytest.mark.xdist_group("sweep")
@pytest.mark.parametrize(("step", "log_every"), [(2, 1), (7, 1), (6, 3)])
def test_after_a_signal_every_variant_has_an_exact_checkpoint_to_resume(
    zoo: Zoo, tmp_path: Path, step: int, log_every: int
) -> None:
    sweep = Sweep(zoo("llama"), tmp_path)
    overrides = ("adapter.rank=2,4", "adapter.dropout=0.1", f"train.log_every={log_every}")
    names = sweep.train_alone(*overrides)
    with signal_in_step(step), pytest.raises(Stopped) as caught:
        sweep.train_together(*overrides)
    assert caught.value.exit_code == 143
    for index, name in enumerate(names):
        folder, steps = tmp_path / "together" / name, (step + 1 - index) // 2  # no step starts after the signal
        checkpoints = list(folder.glob("checkpoint-*"))
        assert [checkpoint.name for checkpoint in checkpoints] == ([f"checkpoint-{steps:06d}"] if steps else [])
        assert [line["step"] for line in metrics(folder)[-1:]] == ([steps] if steps else [])
    sweep.train_together(*overrides)
    for folder in (tmp_path / "together").glob("*/checkpoint-*"):  # the runs alone wrote none
        folder.rename(tmp_path / f"{folder.parent.name}-{folder.name}")
    if log_every == 1:  # else the step of the signal has an additional line, as in a run that is stopped alone
        sweep.assert_same_runs(names)
    for name in names:
        assert differing_tensors(tmp_path / "together" / name, tmp_path / "alone" / name) == []


@pytest.mark.xdist_group("sweep")
def test_a_signal_before_the_first_step_writes_nothing(zoo: Zoo, tmp_path: Path) -> None:
    def interrupt(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if isinstance(module, LoraLinear):
            signal.raise_signal(signal.SIGINT)

    hook = register_module_module_registration_hook(interrupt)
    try:
        with pytest.raises(Stopped) as caught:
            Sweep(zoo("llama"), tmp_path).train_together("adapter.rank=2,4")
    finally:
        hook.remove()
    assert caught.value.exit_code == 130 and not (tmp_path / "together").exists()


@pytest.mark.xdist_group("sweep")
def test_a_non_finite_step_is_skipped_by_its_variant_alone(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, "train.micro_batch=4", "train.max_steps=5")
    with nan_gradient("rank-3", [2, 4]):
        sweep.train_together("adapter.rank=3,4")
    results = [json.loads((tmp_path / "together" / f"rank-{r}" / "run.json").read_text())["result"] for r in (3, 4)]
    assert [result["skipped_steps"] for result in results] == [2, 0]
    sweep.assert_same_runs(sweep.train_alone("adapter.rank=3,4", names=["rank-4"]))


@pytest.mark.xdist_group("sweep")
def test_a_variant_that_fails_does_not_end_the_others(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, "train.micro_batch=4", "train.max_steps=5")
    with nan_gradient("rank-3", [2, 3, 4]):
        result = sweep.train_together("adapter.rank=3,4")
    with pytest.raises(QloraError, match="1 of 2 variants failed: rank-3") as caught:
        result.refuse_failures()
    assert caught.value.exit_code == 1 and "3 steps in a row" in str(result.failure)
    assert not (tmp_path / "together" / "rank-3" / "run.json").exists()
    sweep.train_alone("adapter.rank=3,4")
    sweep.assert_same_runs(["rank-4"])
    assert "failed" in result.table() and result.summary["variants"][0]["error"]
    assert sweep.train_together("adapter.rank=3,4").failure is None  # trains it again, and keeps the other
    sweep.assert_same_runs(["rank-3", "rank-4"])


@pytest.mark.xdist_group("sweep")
def test_early_stopping_ends_one_variant_only(zoo: Zoo, tmp_path: Path) -> None:
    options = ("data.eval_fraction=0.2", "train.eval_every=1", "train.early_stop=2", "train.max_steps=5")
    sweep = Sweep(zoo("llama"), tmp_path, *options, "data.train_on=all")
    result = sweep.train_together("optim.learning_rate=10,1e-4")
    steps = [variant["steps"] for variant in result.summary["variants"]]
    assert steps[0] < steps[1] == 5
    sweep.assert_same_runs(sweep.train_alone("optim.learning_rate=10,1e-4"))


@pytest.mark.xdist_group("sweep")
def test_finished_variants_are_kept_and_new_or_changed_ones_trained(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, "train.max_steps=2")
    sweep.train_together("adapter.rank=2,3")
    before = (tmp_path / "together" / "rank-2" / "run.json").read_bytes()
    weights = tmp_path / "together" / "rank-3" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    variants = sweep.train_together("adapter.rank=2,3,4").summary["variants"]
    assert [variant["kept"] for variant in variants] == [True, False, False]
    assert (tmp_path / "together" / "rank-2" / "run.json").read_bytes() == before
    sweep.assert_same_runs(sweep.train_alone("adapter.rank=2,3,4"))
    with sweep.data.open("a") as file:
        file.write(sweep.data.read_text().splitlines()[0].replace("0 ", "77 ") + "\n")
    variants = sweep.train_together("adapter.rank=2,3,4").summary["variants"]
    assert not any(variant["kept"] for variant in variants)


@pytest.mark.xdist_group("sweep")
def test_an_error_before_the_first_step_names_its_variant(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path)
    file = {"good": {"adapter.rank": 2}, "bad": {"adapter.targets": ["no_proj"]}}
    with pytest.raises(InputError, match=r"^bad: adapter\.targets: 'no_proj' matches no linear layer"):
        sweep.train_together(file=file)
    assert not (tmp_path / "together").exists()


@pytest.mark.xdist_group("sweep")
def test_other_settings_in_a_variants_folder_are_refused_with_its_name(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, "train.save_every=1", "train.max_steps=2")
    sweep.train_together("adapter.rank=2,3")
    with pytest.raises(InputError, match=r"^rank-2: .*optim\.weight_decay"):
        sweep.train_together("adapter.rank=2,3", "optim.weight_decay=0.5")


@pytest.mark.xdist_group("sweep")
def test_a_variant_finished_under_the_old_name_of_its_optimizer_is_kept(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, "train.max_steps=1", "optim.kind=offloaded_adamw")
    sweep.train_together("adapter.rank=2,3")
    folder = tmp_path / "together" / "rank-2"
    manifest = json.loads((folder / "run.json").read_text())
    recipe_text = (folder / "recipe.yaml").read_text()
    assert "kind: offloaded_adamw\n" in recipe_text
    (folder / "recipe.yaml").write_text(recipe_text.replace("kind: offloaded_adamw\n", "kind: hosted_adamw\n"))
    manifest["files"]["recipe.yaml"] = sha256_of(folder / "recipe.yaml")
    write_json(folder / "run.json", manifest)
    variants = sweep.train_together("adapter.rank=2,3", "optim.kind=hosted_adamw").summary["variants"]
    assert [variant["kept"] for variant in variants] == [True, True]
