"""Loss scaling: equal to torch's GradScaler step for step; an overflow is a skipped step, not an error of the run."""

import random
from pathlib import Path

import pytest
import torch
from support.small_runs import metrics, recipe_of, run, write_records
from support.stopped_runs import RECORDS, Zoo, non_finite_gradient
from support.training_hooks import before_update
from torch import nn

from qlora.errors import QloraError
from qlora.training.loss_scale import INITIAL, SMALLEST, UNSCALED, LossScale, unscale
from qlora.training.nonfinite import MAX_CONSECUTIVE

INTERVAL = 4  # finite steps after which the scale doubles; 2,000 in a run


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_scale_gradients_and_skipped_steps_are_those_of_grad_scaler(share: float) -> None:
    """A random sequence of steps, `share` of them with a gradient that is not finite."""
    draw, scale = random.Random(0), LossScale()
    torch_parameter, own_parameter = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizers = [torch.optim.SGD([parameter], lr=0.1) for parameter in (torch_parameter, own_parameter)]
    scaler = torch.amp.GradScaler("cpu", growth_interval=INTERVAL)  # type: ignore[attr-defined]
    skipped = 0
    for _ in range(60):
        value = draw.choice([float("inf"), float("nan")]) if draw.random() < share else draw.uniform(-1, 1)
        assert scale.value == scaler.get_scale() and scale.value > SMALLEST
        scaler.scale(torch_parameter.sum() * value).backward()
        scaler.unscale_(optimizers[0])
        (own_parameter.sum() * value * scale.value).backward()
        unscale([own_parameter], scale.value)
        gradients = [parameter.grad for parameter in (torch_parameter, own_parameter)]
        assert torch.equal(*gradients) or not all(bool(gradient.isfinite().all()) for gradient in gradients)
        is_finite = bool(own_parameter.grad.isfinite().all())  # type: ignore[union-attr]
        scaler.step(optimizers[0])
        if is_finite:
            optimizers[1].step()
        skipped += not is_finite
        assert torch.equal(torch_parameter, own_parameter)
        scaler.update()
        scale = scale.after(is_finite, INTERVAL)
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert (skipped > 0) == (share > 0)


def test_the_scale_ends_at_one_and_at_the_largest_float32() -> None:
    scale = LossScale()
    for _ in range(40):
        scale = scale.after(False)
    assert scale == UNSCALED and not scale.is_overflow(float("inf"), 1.0)
    for _ in range(200):
        scale = scale.after(True, interval=1)
    assert scale.value == 2.0**127 and torch.tensor(scale.value).isfinite()


def test_only_a_gradient_above_the_smallest_scale_is_an_overflow() -> None:
    assert LossScale().is_overflow(float("nan"), 1.0) and not LossScale().is_overflow(1.0, 1.0)
    assert not LossScale().is_overflow(float("inf"), float("nan"))


def test_overflows_are_skipped_counted_and_logged_with_the_scale(zoo: Zoo, tmp_path: Path) -> None:
    """More of them in a row than the guard allows of steps that no scale can mend."""
    data, steps = write_records(tmp_path / "records.jsonl", RECORDS), range(2, 3 + MAX_CONSECUTIVE)
    options = ("model.dtype=float16", "train.micro_batch=4", "train.max_steps=7")
    updates: list[int] = []
    with non_finite_gradient(steps, float("inf")), before_update(updates.append):
        result = run(recipe_of(zoo("llama"), data, tmp_path / "run", *options))["result"]
    lines = metrics(tmp_path / "run")
    assert result["skipped_steps"] == result["overflow_steps"] == len(steps) == 7 - len(updates)
    assert result["loss_scale"] == lines[-1]["loss_scale"] == INITIAL / 2 ** len(steps)
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 3, 4, 4, 4]
    assert [line["loss"] is None for line in lines] == [number in steps for number in range(1, 8)]


def test_overflows_down_to_the_smallest_scale_end_the_run(zoo: Zoo, tmp_path: Path) -> None:
    data = write_records(tmp_path / "records.jsonl", RECORDS)
    options = ("model.dtype=float16", "train.micro_batch=4", "train.max_steps=40")
    expected = f"step {16 + MAX_CONSECUTIVE}: loss or gradient is not finite for {MAX_CONSECUTIVE} steps in a row"
    with non_finite_gradient(range(100), float("inf")), pytest.raises(QloraError, match=expected):
        run(recipe_of(zoo("llama"), data, tmp_path / "run", *options))
