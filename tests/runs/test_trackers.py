"""Trackers of this machine: they hold the values of metrics.jsonl and print nothing; a missing one is an error."""

import importlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.small_runs import recipe_of, run, write_records

from qlora.errors import RecipeError
from qlora.recipe.check_paths import require_paths
from qlora.training.run_log import read_metrics

Zoo = Callable[..., Path]
Values = dict[tuple[str, int], float]  # name, step -> value


def of_tensorboard(folder: Path) -> Values:
    module: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder / "qlora")).Reload()
    return {(name, event.step): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}


def of_trackio(folder: Path) -> Values:
    with closing(sqlite3.connect(folder.parent / "trackio" / "qlora.db")) as database:
        rows = database.execute("select step, metrics from metrics where run_name = ?", (folder.name,)).fetchall()
    return {(name, step): value for step, line in rows for name, value in json.loads(line).items()}


@pytest.mark.parametrize(
    "tracker",
    [
        pytest.param(name, marks=pytest.mark.skipif(not find_spec(name), reason=f"not installed: pip install {name}"))
        for name in ("tensorboard", "trackio")
    ],
)
def test_a_tracker_holds_the_values_of_the_metrics_file(
    tracker: str, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    records, folder = write_records(tmp_path / "records.jsonl", 12), tmp_path / "mine"
    model = zoo("llama")
    capfd.readouterr()
    run(recipe_of(model, records, folder, "train.max_steps=2", f"train.report_to=[{tracker}]"))
    screen = capfd.readouterr()
    assert (screen.out, screen.err) == ("", "")
    lines = [{name: value for name, value in line.items() if name != "event"} for line in read_metrics(folder)]
    values = {(name, line["step"]): value for line in lines for name, value in line.items() if name != "step"}
    tracked = {"tensorboard": of_tensorboard, "trackio": of_trackio}[tracker](folder)
    assert len(values) > 10 and tracked == pytest.approx(values, rel=1e-6)


def test_a_tracker_that_is_not_installed_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    missing = next(name for name in ("comet_ml", "clearml", "aim", "dvclive") if not find_spec(name))
    recipe = recipe_of(
        zoo("llama"), write_records(tmp_path / "r.jsonl", 4), tmp_path / "run", f"train.report_to=[{missing}]"
    )
    with pytest.raises(RecipeError, match=rf"train\.report_to: not installed: {missing.replace('_', '-')}"):
        require_paths(recipe)
