"""docs/first_run.ipynb: its code cells run in order, and it is stored without outputs."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

NOTEBOOK = json.loads((ROOT / "docs" / "first_run.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def script() -> Iterator[str]:
    """The code cells as Python; `!command` as a call that raises an error where the command fails."""
    yield "import subprocess"
    for line in "\n".join(CODE).splitlines():
        yield f"subprocess.run({line[1:]!r}, shell=True, check=True)" if line.startswith("!") else line


def test_it_is_stored_without_outputs() -> None:
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert NOTEBOOK["nbformat"] == 4 and cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.slow
def test_it_runs_from_the_first_cell_to_the_last(tmp_path: Path) -> None:
    commands = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    process = subprocess.run(
        [sys.executable, "-c", "\n".join(script())], cwd=tmp_path, env=os.environ | {"PATH": commands},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    assert "top-1 agreement 100.0%" in process.stdout and "city: Lyon" in process.stdout
