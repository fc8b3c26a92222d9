"""Objectives that compare answers on a page: margin and accuracy as curves, the held-out answers as facts."""

from collections.abc import Sequence

from qlora.runs.report import number_format
from qlora.runs.report.run_data import RunData
from qlora.runs.report.series import points

CURVES = (  # key of a training line, title, unit
    ("margin", "Margin of the rewards", "chosen - rejected"),
    ("accuracy", "Preferred answers", "fraction of pairs"),
    ("chosen_log_prob", "Chosen answers", "log-probability, nats"),
)


def keys_of(runs: Sequence[RunData]) -> list[tuple[str, str, str]]:
    """The CURVES that any of the runs has logged."""
    return [curve for curve in CURVES if any(points(run.metrics, "train", curve[0]) for run in runs)]


def held_out_answers(run: RunData) -> dict[str, str]:
    """Accuracy, margin, and log-probabilities of the held-out answers at the first and the last evaluation."""
    facts = {}
    accuracy, margin = (points(run.metrics, "eval", f"eval_{name}") for name in ("accuracy", "margin"))
    if accuracy:
        facts["held-out pairs preferred"] = number_format.share(accuracy[-1][1], 1.0)
    if margin:
        facts["held-out margin"] = f"{margin[-1][1]:.3f}"
    for role in ("chosen", "rejected"):
        curve = points(run.metrics, "eval", f"eval_{role}_log_prob")
        if curve:
            facts[f"log-probability, {role}"] = f"{curve[0][1]:.1f} \u2192 {curve[-1][1]:.1f} nats"
    return facts
