"""Each run of a sweep ends as it would alone, no bit and no loss differs; what befalls one leaves the others."""

import json
import signal
from pathlib import Path

import pytest
from support.small_runs import differing, metrics
from support.sweeps import Sweep, Zoo, poisoned, signalled

from qlora.errors import InputError, QloraError, Stopped

SAVING = ("train.save_every=2", "data.eval_fraction=0.2", "train.eval_every=3")
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


@pytest.mark.xdist_group("sweep")
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_every_variant_ends_as_its_run_alone_would(zoo: Zoo, tmp_path: Path, dtype: str) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, *SAVING, f"model.dtype={dtype}")
    outcome = sweep.together(file=DIFFERENT)
    assert outcome.failure is None
    names = sweep.alone(file=DIFFERENT)
    assert names == list(DIFFERENT)
    sweep.same(names)


@pytest.mark.xdist_group("sweep")
@pytest.mark.parametrize("memory", ["memory.recompute=all", "memory.weights=stream"])
def test_however_the_layers_are_arranged(zoo: Zoo, tmp_path: Path, memory: str) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, memory, "adapter.dropout=0.2")
    sweep.together("adapter.kind=lora,dora")
    sweep.same(sweep.alone("adapter.kind=lora,dora"))


@pytest.mark.xdist_group("sweep")
@pytest.mark.parametrize(("at", "log_every"), [(1, 1), (2, 1), (7, 1), (12, 1), (6, 3)])
def test_a_signal_leaves_each_variant_an_exact_checkpoint_and_the_sweep_goes_on(
    zoo: Zoo, tmp_path: Path, at: int, log_every: int
) -> None:
    sweep, swept = Sweep(zoo("llama"), tmp_path), ("adapter.rank=2,4", "adapter.dropout=0.1")
    swept = (*swept, f"train.log_every={log_every}")
    names = sweep.alone(*swept)
    with signalled(at), pytest.raises(Stopped) as caught:
        sweep.together(*swept)
    assert caught.value.exit_code == 143
    for place, name in enumerate(names):
        folder, taken = tmp_path / "together" / name, (at + 1 - place) // 2  # no step is begun after the signal
        found = list(folder.glob("checkpoint-*"))
        assert [checkpoint.name for checkpoint in found] == ([f"checkpoint-{taken:06d}"] if taken else [])
        assert [line["step"] for line in metrics(folder)[-1:]] == ([taken] if taken else [])
    sweep.together(*swept)
    for folder in (tmp_path / "together").glob("*/checkpoint-*"):  # which the runs alone never wrote
        folder.rename(tmp_path / f"{folder.parent.name}-{folder.name}")
    if log_every == 1:  # else the step at which it was stopped has a line, as in a run that was stopped alone
        sweep.same(names)
    for name in names:
        assert differing(tmp_path / "together" / name, tmp_path / "alone" / name) == []


@pytest.mark.xdist_group("sweep")
def test_a_signal_while_it_is_prepared_writes_nothing(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora.runs.sweep import variant_run

    equip = variant_run.equip

    def interrupted(*arguments: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return equip(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(variant_run, "equip", interrupted)
    with pytest.raises(Stopped) as caught:
        Sweep(zoo("llama"), tmp_path).together("adapter.rank=2,4")
    assert caught.value.exit_code == 130 and not (tmp_path / "together").exists()


@pytest.mark.xdist_group("sweep")
def test_a_step_that_is_not_finite_is_skipped_by_its_variant_alone(zoo: Zoo, tmp_path: Path) -> None:
    sweep, swept = Sweep(zoo("llama"), tmp_path, "train.micro_batch=4"), ("adapter.rank=2,3,4",)
    with poisoned("rank-3", [2, 5]):
        sweep.together(*swept)
    results = [json.loads((tmp_path / "together" / f"rank-{r}" / "run.json").read_text())["result"] for r in (2, 3, 4)]
    assert [result["skipped_steps"] for result in results] == [0, 2, 0]
    sweep.alone(*swept)
    sweep.same(["rank-2", "rank-4"])


@pytest.mark.xdist_group("sweep")
def test_a_variant_that_fails_takes_no_other_with_it(zoo: Zoo, tmp_path: Path) -> None:
    sweep, swept = Sweep(zoo("llama"), tmp_path, "train.micro_batch=4"), ("adapter.rank=2,3,4",)
    with poisoned("rank-3", [2, 3, 4]):
        outcome = sweep.together(*swept)
    with pytest.raises(QloraError, match="1 of 3 variants failed: rank-3") as caught:
        outcome.refuse_failures()
    assert caught.value.exit_code == 1 and "3 steps in a row" in str(outcome.failure)
    assert not (tmp_path / "together" / "rank-3" / "run.json").exists()
    sweep.alone(*swept)
    sweep.same(["rank-2", "rank-4"])
    assert "failed" in outcome.table() and outcome.found["variants"][1]["error"]
    assert sweep.together(*swept).failure is None  # tries it again, and keeps the others
    sweep.same(["rank-2", "rank-3", "rank-4"])


@pytest.mark.xdist_group("sweep")
def test_early_stopping_ends_one_variant_only(zoo: Zoo, tmp_path: Path) -> None:
    options = ("data.eval_fraction=0.2", "train.eval_every=1", "train.early_stop=2", "train.max_steps=25")
    sweep, swept = Sweep(zoo("llama"), tmp_path, *options), ("optim.learning_rate=1,1e-4",)
    outcome = sweep.together(*swept)
    steps = [each["steps"] for each in outcome.found["variants"]]
    assert steps[0] < steps[1] == 25
    sweep.same(sweep.alone(*swept))


@pytest.mark.xdist_group("sweep")
def test_what_is_finished_is_kept_and_what_is_new_or_changed_is_trained(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path)
    sweep.together("adapter.rank=2,3")
    before = (tmp_path / "together" / "rank-2" / "run.json").read_bytes()
    weights = tmp_path / "together" / "rank-3" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    found = sweep.together("adapter.rank=2,3,4").found["variants"]
    assert [each["kept"] for each in found] == [True, False, False]
    assert (tmp_path / "together" / "rank-2" / "run.json").read_bytes() == before
    sweep.same(sweep.alone("adapter.rank=2,3,4"))
    with sweep.data.open("a") as file:
        file.write(sweep.data.read_text().splitlines()[0].replace("0 ", "77 ") + "\n")
    assert not any(each["kept"] for each in sweep.together("adapter.rank=2,3,4").found["variants"])


@pytest.mark.xdist_group("sweep")
def test_an_error_before_the_first_step_names_its_variant_and_nothing_is_trained(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path)
    file = {"good": {"adapter.rank": 2}, "bad": {"adapter.targets": ["no_proj"]}}
    with pytest.raises(InputError, match=r"^bad: adapter\.targets: 'no_proj' matches no linear layer"):
        sweep.together(file=file)
    assert not (tmp_path / "together").exists()


@pytest.mark.xdist_group("sweep")
def test_other_settings_in_a_variants_folder_are_refused_with_its_name(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, "train.save_every=2")
    sweep.together("adapter.rank=2,3")
    with pytest.raises(InputError, match=r"^rank-2: .*optim\.weight_decay"):
        sweep.together("adapter.rank=2,3", "optim.weight_decay=0.5")
