"""`qlora sweep --find-lr`: the learning rate by measurement, on one resident base.

First a range of rates over three powers of ten in short runs, then rates a factor of two apart around the best one,
at the length of the run, until the best has a neighbor on both sides. Short runs prefer higher rates (Schulman et al.
2025, LoRA Without Regret), so the second part starts below. Each variant is what `qlora train` of its recipe trains.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora.errors import InputError, QloraError
from qlora.recipe.literature import suggest_rate
from qlora.recipe.recipe import Recipe, dump
from qlora.runs.report.rate_curve import rate_figure
from qlora.runs.resources import open_processes
from qlora.runs.sweep.result import SWEEP_JSON, SweepResult, write_result
from qlora.runs.sweep.variant_run import SharedBase, VariantRun, error_text
from qlora.runs.sweep.variants import RATES_AT_ONCE, Variant
from qlora.training.schedule import count_steps
from qlora.utils.atomic_files import write_json, write_text

RANGE = tuple(
    10 ** ((number - RATES_AT_ONCE // 2) / 2) for number in range(RATES_AT_ONCE)
)  # times the rate of the literature
AROUND = (0.25, 0.5, 1.0, 2.0)  # times the best of the range
SHORTEST, SHARE = 10, 4  # steps of the range: a quarter of the run's, at least so many
LONGEST = 300  # steps of a run of the second part
MOST_BEYOND = 4  # rates below or above those that a part starts with
FLAT = 0.01  # relative difference of losses that is hardly one
RECIPE, CHOSEN = "recipe.yaml", "chosen"  # the written recipe, and its run folder


@dataclass
class RatePoint:
    """A rate, and what its run measured."""

    stage: str  # range | refinement
    rate: float
    steps: int
    name: str
    eval_loss: float | None = None  # None: it failed
    error: str | None = None


@dataclass
class RateSearch:
    """The rounds of a search for the learning rate of one recipe."""

    recipe: Recipe
    out: Path
    notes: tuple[str, ...] = ()
    points: dict[str, RatePoint] = field(default_factory=dict)  # by the name of the variant
    steps: int = 0  # of the run

    def variants(self, runs: Sequence[VariantRun], shared: SharedBase) -> Sequence[Variant]:
        """The next rates to train. InputError without held-out examples; QloraError if no run of the range ends."""
        self._read_results(runs)
        if not self.points:
            self.steps = self._count_steps(shared)
            center = suggest_rate(self.recipe).rate
            return self._group("range", [center * factor for factor in RANGE], shared)
        stage, rates = self.next_rates()
        return self._group(stage, rates, shared) if rates else []

    def next_rates(self) -> tuple[str, list[float]]:
        """The stage, and the rates to train in it: beyond the end where the best one is; then the refinement; none."""
        stage = "refinement" if any(point.stage == "refinement" for point in self.points.values()) else "range"
        best, rates = self.best(stage), self._rates(stage)
        factor, count = (10**0.5, len(RANGE)) if stage == "range" else (2.0, len(AROUND))
        if best.rate in (rates[0], rates[-1]) and len(rates) < count + MOST_BEYOND:
            return stage, [best.rate / factor if best.rate == rates[0] else best.rate * factor]
        return "refinement", [] if stage == "refinement" else [best.rate * share for share in AROUND]

    def best(self, stage: str) -> RatePoint:
        """The point of a stage with the lowest held-out loss. QloraError if all of its runs failed."""
        measured = [p for p in self.points.values() if p.stage == stage and p.eval_loss is not None]
        if not measured:
            error = next((point.error for point in self.points.values() if point.error), "")
            raise QloraError(f"--find-lr: every run failed: {error}")
        return min(measured, key=lambda point: point.eval_loss if point.eval_loss is not None else math.inf)

    def reason(self) -> str:
        """Why the rate was chosen, with its neighbors' losses."""
        best, rates = self.best("refinement"), self._rates("refinement")
        measured = {p.rate: p for p in self.points.values() if p.stage == "refinement"}
        place = rates.index(best.rate)
        neighbors = [measured[rate] for rate in rates[max(0, place - 1) : place + 2] if rate != best.rate]
        others = ", ".join(f"{_loss(point)} at {point.rate:g}" for point in neighbors)
        close = [rate for rate in rates if (loss := measured[rate].eval_loss) is not None and loss <= _limit(best)]
        flat = f" Rates from {close[0]:g} to {close[-1]:g} are within {FLAT:.0%} of it." if len(close) > 1 else ""
        end = {rates[0]: "lowest", rates[-1]: "highest"}.get(best.rate)
        flat += f" It is the {end} of the rates that were tried: a better one may lie beyond it." if end else ""
        length = f" of {self.steps:,}; longer runs like somewhat lower rates" if best.steps < self.steps else ""
        lowest = f"{best.rate:g} has the lowest held-out loss, {_loss(best)} after {best.steps:,} steps{length}"
        return f"{lowest} ({others}).{flat}"

    def write(self, runs: Sequence[VariantRun], out: Path, seconds: float) -> SweepResult:
        """The recipe with the chosen rate, sweep.json, and the page with the curve and the runs of the second part."""
        self._read_results(runs)
        best, suggestion = self.best("refinement"), suggest_rate(self.recipe)
        train = self.recipe.train.model_copy(update={"output": str(out / CHOSEN)})
        chosen = _with_rate(self.recipe, best.rate).model_copy(update={"train": train})
        write_text(out / RECIPE, dump(chosen))
        curve = sorted(self.points.values(), key=lambda point: (point.stage, point.rate))
        search = {
            "rate": best.rate,
            "reason": self.reason(),
            "suggested": suggestion.rate,
            "source": suggestion.source,
            "recipe": str(out / RECIPE),
            "curve": [vars(point) for point in curve],
        }
        finished = [run for run in runs if self.points[run.name].stage == "refinement" and run.error is None]
        result = write_result(finished, out, seconds, rate_figure(search))
        summary = {**result.summary, "find_lr": search, "notes": [*result.summary["notes"], search["reason"]]}
        write_json(out / SWEEP_JSON, summary)
        return SweepResult(summary, None)

    def _rates(self, stage: str) -> list[float]:
        return sorted(point.rate for point in self.points.values() if point.stage == stage)

    def _count_steps(self, shared: SharedBase) -> int:
        data, _ = shared.read(self.recipe, open_processes(self.recipe), shared.base, shared.log)
        if not data.eval:
            raise InputError("--find-lr compares held-out losses. Set data.eval, or data.eval_fraction above 0.")
        return count_steps(self.recipe.train, len(data.train))

    def _group(self, stage: str, rates: Sequence[float], shared: SharedBase) -> list[Variant]:
        """Variants for rates that this stage has not trained yet."""
        steps = min(self.steps, LONGEST) if stage == "refinement" else self._range_steps()
        variants = []
        for rate in [float(f"{rate:.1e}") for rate in rates]:
            name = f"{'range_' if stage == 'range' else ''}learning_rate-{rate:g}"
            if name not in self.points:
                point = self.points[name] = RatePoint(stage, rate, steps, name)
                variants.append(self._variant(point))
        rates_text = ", ".join(variant.settings["optim.learning_rate"] for variant in variants)
        shared.log.print(f"{stage}: learning rates {rates_text}, {steps:,} steps each")
        return variants

    def _range_steps(self) -> int:
        return min(self.steps, max(SHORTEST, self.steps // SHARE))

    def _variant(self, point: RatePoint) -> Variant:
        recipe, settings = _with_rate(self.recipe, point.rate), {"optim.learning_rate": f"{point.rate:g}"}
        changes: dict[str, Any] = {"output": str(self.out / point.name)}
        if point.steps != self.steps:
            settings["train.max_steps"] = str(point.steps)
            changes |= {"max_steps": point.steps}
        if point.stage == "range":
            changes |= {"eval_every": None, "save_every": None, "early_stop": None}
        train = recipe.train.model_copy(update=changes)
        return Variant(point.name, settings, recipe.model_copy(update={"train": train}), self.notes)

    def _read_results(self, runs: Sequence[VariantRun]) -> None:
        for run in runs:
            result: Mapping[str, Any] = (run.manifest or {}).get("result", {})
            loss = result.get("eval_loss")
            error = error_text(run.error) if run.error else None
            self.points[run.name] = replace(self.points[run.name], eval_loss=None if error else loss, error=error)


def _with_rate(recipe: Recipe, rate: float) -> Recipe:
    return recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"learning_rate": rate})})


def _loss(point: RatePoint) -> str:
    return "failed" if point.eval_loss is None else f"{point.eval_loss:.4f}"


def _limit(best: RatePoint) -> float:
    """The held-out loss that is hardly above the best one."""
    return (best.eval_loss or 0.0) * (1 + FLAT)
