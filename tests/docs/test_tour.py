"""docs/tour.md names the files that one training step runs through, and no others."""

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support.documents import ROOT
from support.training_hooks import before_first_forward

from qlora.recipe.recipe import from_mapping
from qlora.runs.train import train

TOUR = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
PATH = TOUR.split("<!-- path -->")[1].split("<!-- /path -->")[0]
LISTED = re.findall(r"^\d+\. `(qlora/[\w/]+\.py)`", PATH, flags=re.MULTILINE)
MAX_LINES = 3100
PACKAGE = (ROOT / "qlora").resolve()
DEMO = ROOT / "qlora" / "demo"
STEP = (str(PACKAGE / "training" / "loop.py"), "_step")  # the function where the tour begins


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of the package in which a function runs during the optimizer steps of a run with default settings."""
    files: set[str] = set()
    in_step, finished_steps = False, 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal in_step, finished_steps
        code = frame.f_code
        if event in ("call", "return") and (code.co_filename, code.co_name) == STEP:
            in_step = event == "call"
            finished_steps += not in_step
            if finished_steps == 2:
                sys.setprofile(None)
        if in_step and event == "call":
            files.add(code.co_filename)

    folder = tmp_path_factory.mktemp("tour")
    records = (DEMO / "data" / "eval.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "records.jsonl").write_text("".join(records[:30]), encoding="utf-8")
    recipe, _ = from_mapping(
        {
            "model": {"name": str(DEMO / "base"), "dtype": "float32"},  # faster on a CPU
            "data": {"train": str(folder / "records.jsonl"), "max_length": 256, "eval_fraction": 0.1},
            "train": {"output": str(folder / "run"), "max_steps": 2, "global_batch": 2},
        }
    )
    with before_first_forward(lambda model: sys.setprofile(profile)):  # the evaluation before the first step
        train(recipe, quiet=True)
    return {f"qlora/{Path(file).relative_to(PACKAGE).as_posix()}" for file in files if file.startswith(f"{PACKAGE}/")}


def test_the_tour_names_exactly_the_files_of_a_training_step(traced: set[str]) -> None:
    assert {*LISTED} - traced == set(), "listed, but not used in a step"
    assert traced - {*LISTED} == set(), "missing from the tour"
    assert len(LISTED) == len({*LISTED})


def test_the_files_are_short_enough_for_an_hour() -> None:
    lines = sum(len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in LISTED)
    assert lines < MAX_LINES, f"{lines} lines on the path of one step: shorten the path, do not raise the limit"
    assert re.match(rf"# .*\n\n{len(LISTED)} files, under {MAX_LINES:,} lines", TOUR)


def test_every_file_that_a_document_names_exists() -> None:
    for document in (ROOT / "docs").rglob("*.md"):
        text = document.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:qlora|tests|benchmarks|recipes)/[\w./-]+)`", text):
            assert (ROOT / name).exists() or "int8" in name, f"{document.name}: {name}"


def test_every_package_has_its_section() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = {path.parent.name for path in (ROOT / "qlora").glob("*/__init__.py")}
    assert {*re.findall(r"^## `(\w+)/`", text, flags=re.MULTILINE)} == packages
