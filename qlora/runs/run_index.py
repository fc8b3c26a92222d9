"""`qlora report FOLDER`: one index page of all runs below a folder. Imports no torch."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from qlora.errors import InputError, QloraError
from qlora.runs.artifacts import MANIFEST, PAGE
from qlora.runs.compare import read_run_data
from qlora.runs.report.index_page import IndexedRun, index_page
from qlora.runs.report.run_data import RunData
from qlora.training.run_log import METRICS
from qlora.utils.atomic_files import write_text

INDEX = "index.html"


def is_run(folder: Path) -> bool:
    """Whether a folder has the files of a run."""
    return any((folder / name).is_file() for name in (MANIFEST, METRICS))


def has_runs_below(folder: Path) -> bool:
    """Whether a folder that is not a run itself has one below it."""
    return folder.is_dir() and not is_run(folder) and next(_run_folders(folder), None) is not None


def write_index_page(folder: Path, out: Path) -> dict[str, Any]:
    """Write the index page of the runs below `folder`. InputError if there are none."""
    runs = sorted(_run_folders(folder))
    if not runs:
        raise InputError(f"{folder}: no run in this folder or below it. A run folder has {MANIFEST} or {METRICS}.")
    indexed = [_indexed(run, run.relative_to(folder).as_posix(), out) for run in runs]
    page = index_page(f"{len(runs)} run{'s' * (len(runs) != 1)} in {folder.resolve().name}", indexed)
    write_text(out, page)
    return {"path": str(out), "bytes": len(page.encode()), "runs": [item.run.name for item in indexed]}


def _indexed(run: Path, name: str, out: Path) -> IndexedRun:
    """A row of the index; a run whose files can't be read, or have nothing yet, does not hide the others."""
    try:
        return IndexedRun(read_run_data(run, name), _address(run, out))
    except QloraError:
        is_damaged = (run / MANIFEST).is_file()
        return IndexedRun(RunData(name), _address(run, out), "damaged run.json" if is_damaged else "")


def _run_folders(folder: Path) -> Iterator[Path]:
    """Runs below a folder. Hidden folders and those inside of a run, its checkpoints, are left out."""
    for path, names, _ in os.walk(folder):
        if is_run(Path(path)):
            names.clear()
            yield Path(path)
        names[:] = sorted(name for name in names if not name.startswith("."))


def _address(run: Path, out: Path) -> str:
    """The address of a run's page, relative to the index; empty if the run has none yet."""
    page = run / PAGE
    return quote(Path(os.path.relpath(page, out.parent)).as_posix()) if page.is_file() else ""
