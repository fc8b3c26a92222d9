"""A stranger's hour: docs/tour.md names the files that one training step runs through, and no others."""

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support.documents import ROOT

from qlora.recipe.recipe import from_mapping
from qlora.runs.train import train
from qlora.training import loop

TOUR = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
PATH = TOUR.split("<!-- path -->")[1].split("<!-- /path -->")[0]
LISTED = re.findall(r"^\d+\. `(qlora/[\w/]+\.py)`", PATH, flags=re.MULTILINE)
MOST_LINES = 2500
DEMO = ROOT / "qlora" / "demo"


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of the house in which a function runs during the optimizer steps of a run with default settings."""
    found: set[str] = set()

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            found.add(frame.f_code.co_filename)

    taken = loop._step

    def step(job: Any, number: int) -> Any:
        sys.setprofile(look)
        try:
            return taken(job, number)
        finally:
            sys.setprofile(None)

    recipe, _ = from_mapping(
        {
            "model": {"name": str(DEMO / "base"), "dtype": "float32"},  # on a CPU without bfloat16 as well
            "data": {"train": str(DEMO / "data" / "eval.jsonl"), "max_length": 256, "eval_fraction": 0.1},
            "train": {"output": str(tmp_path_factory.mktemp("tour") / "run"), "max_steps": 2, "global_batch": 2},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_step", step)
        train(recipe, quiet=True)
    house = (ROOT / "qlora").resolve()
    return {f"qlora/{Path(file).relative_to(house).as_posix()}" for file in found if Path(file).is_relative_to(house)}


def test_the_tour_names_the_very_files_that_a_step_runs_through(traced: set[str]) -> None:
    assert {*LISTED} - traced == set(), "named in vain"
    assert traced - {*LISTED} == set(), "missing from the tour"
    assert len(LISTED) == len({*LISTED})


def test_together_they_can_be_read_in_an_hour() -> None:
    lines = sum(len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in LISTED)
    assert lines < MOST_LINES, f"{lines} lines on the path of one step: make it shorter, not the limit longer"
    assert re.match(rf"# .*\n\n{len(LISTED)} files, under {MOST_LINES:,} lines", TOUR)


def test_every_file_that_a_document_names_is_there() -> None:
    for document in (ROOT / "docs").rglob("*.md"):
        text = document.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:qlora|tests|benchmarks|recipes)/[\w./-]+)`", text):
            assert (ROOT / name).exists() or "int8" in name, f"{document.name}: {name}"


def test_every_room_has_its_section() -> None:
    text = (ROOT / "docs" / "rooms.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (ROOT / "qlora").glob("*/__init__.py")}
    assert {*re.findall(r"^## `(\w+)/`", text, flags=re.MULTILINE)} == rooms
