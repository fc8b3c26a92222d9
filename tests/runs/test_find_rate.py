"""`qlora sweep --find-lr`: the rate is bracketed, each run equals its run alone, recipe and curve are written."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import qlora
from support.small_runs import differing_tensors, recipe_of, run
from support.sweeps import Sweep

from qlora.recipe.literature import rate_of
from qlora.recipe.recipe import read
from qlora.runs.sweep.find_rate import AROUND, RANGE, RatePoint, RateSearch
from qlora.runs.sweep.variants import RATES_AT_ONCE

Zoo = Callable[..., Path]
SHORT = ("data.eval_fraction=0.3", "train.max_steps=12")


@pytest.mark.slow
@pytest.mark.xdist_group("sweep")
def test_the_rate_is_bracketed_and_its_recipe_written(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, *SHORT)
    out = tmp_path / "together"
    summary = qlora("sweep", sweep.path, "--find-lr", "--json").json
    search = summary["find_lr"]
    stages = {stage: [p for p in search["curve"] if p["stage"] == stage] for stage in ("range", "refinement")}
    assert len(stages["range"]) >= RATES_AT_ONCE and len(stages["refinement"]) >= len(AROUND)
    losses = {point["rate"]: point["eval_loss"] for point in stages["refinement"]}
    assert search["rate"] == min(losses, key=losses.__getitem__)
    assert min(losses) < search["rate"] < max(losses)  # a neighbor on both sides
    assert f"{search['rate']:g} has the lowest held-out loss" in search["reason"]
    assert read(search["recipe"])[0].optim.learning_rate == search["rate"]
    page = (out / "comparison.html").read_text()
    assert "Learning rate" in page and search["reason"] in page
    best = out / f"learning_rate-{search['rate']:g}"
    recipe = read(best / "recipe.yaml")[0]
    alone = recipe.model_copy(update={"train": recipe.train.model_copy(update={"output": str(tmp_path / "alone")})})
    run(alone)
    assert differing_tensors(best, tmp_path / "alone") == []


def test_other_settings_are_not_swept_beside_the_rate(zoo: Zoo, tmp_path: Path) -> None:
    sweep = Sweep(zoo("llama"), tmp_path, *SHORT)
    result = qlora("sweep", sweep.path, "--find-lr", "adapter.rank=2,4")
    assert result.code == 2 and "--find-lr sweeps the learning rate alone" in result.err


def test_rates_by_family_and_size_are_the_published_ones() -> None:
    assert rate_of("llama", 4096).rate == pytest.approx(2.9e-4, rel=0.02)  # of tinker-cookbook
    assert rate_of("qwen3", 4096).rate == pytest.approx(4.7e-4, rel=0.02)
    assert (rate_of("gemma3", 2560).rate, rate_of("gemma3", 8192).rate) == (2e-4, 1e-4)
    assert rate_of("", 0).rate == 2e-4 and not rate_of("llama", 64).fitted


@pytest.mark.parametrize(
    ("loss", "low", "high", "end"),
    [
        (lambda rate: abs(math.log(rate / 3e-3)), 2e-3, 4.5e-3, ""),  # inside of the range
        (lambda rate: abs(math.log(rate / 0.5)), 0.35, 0.75, ""),  # above it: two more rates reach it
        (lambda rate: 1 / rate, 50.0, 200.0, "highest"),  # no end: the search stops and says so
        (lambda rate: rate, 0.0, 1e-8, "lowest"),
        (lambda rate: 1.0, 0.0, 1e-4, ""),  # no difference
        (lambda rate: None if rate > 1e-3 else 1 - rate, 5e-4, 1e-3, ""),  # runs that diverged are neighbors
    ],
)
def test_the_search_ends_beside_the_best_rate_or_says_so(
    loss: Callable[[float], float | None], low: float, high: float, end: str, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, tmp_path, tmp_path)
    search, stage, rates = RateSearch(recipe, tmp_path), "range", [1e-3 * factor for factor in RANGE]
    while rates:
        for rate in rates:
            search.points[f"{stage}-{rate}"] = RatePoint(stage, rate, 10, f"{stage}-{rate}", loss(rate))
        assert len(search.points) < 20
        stage, rates = search.next_rates()
    assert low <= search.best("refinement").rate <= high
    assert (f"the {end} of the rates" in search.reason()) == ("beyond" in search.reason()) == bool(end)
