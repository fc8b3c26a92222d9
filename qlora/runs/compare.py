"""report.html drawn anew from run folders: one run, or several over each other on one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora.errors import InputError
from qlora.utils.atomic_files import read_json, write_text
from qlora.runs.report.page import RunData, report_page
from qlora.training.run_log import read_metrics

RECIPE, MANIFEST = "recipe.yaml", "run.json"  # as artefacts.py writes them; importing it would take torch
MOST_RUNS = 12  # six colours, each once more dashed


def draw(runs: Sequence[str], out: str) -> dict[str, Any]:
    """Write the page of these runs to `out`; returns its path, its bytes and the names of the runs.

    InputError if a folder is no run, a run is named twice, or there are more than the colours can tell apart.
    """
    if len(runs) > MOST_RUNS:
        raise InputError(f"{len(runs)} runs, allowed: at most {MOST_RUNS} on one page.")
    folders = [Path(run) for run in runs]
    twice = next((each for each in folders if sum(each.resolve() == other.resolve() for other in folders) > 1), None)
    if twice is not None:
        raise InputError(f"{twice}: named twice. Name each run once.")
    names = distinct_names(folders)
    page = report_page([read_run(folder, name) for folder, name in zip(folders, names, strict=True)])
    write_text(Path(out), page)
    return {"path": out, "bytes": len(page.encode()), "runs": names}


def read_run(folder: Path, name: str) -> RunData:
    """What a page shows of a run, also of one that still goes on. InputError if the folder is none."""
    metrics = read_metrics(folder)
    try:
        manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    except ValueError as error:
        raise InputError(f"{folder / MANIFEST}: is damaged ({error}).") from None
    if not metrics and not manifest:
        raise InputError(f"{folder}: no run. A run's folder has {MANIFEST} or metrics.jsonl.")
    return RunData(name, manifest, metrics, _recipe_text(folder / RECIPE), _samples(manifest))


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Each folder's last name, with as many of those above it as tell all of them apart."""
    whole = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({parts[-depth:] for parts in whole}) < len(whole):
        depth += 1
    return ["/".join(parts[-depth:]) for parts in whole]


def _recipe_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _samples(manifest: dict[str, Any]) -> list[dict[str, str]]:
    """The answers that the run wrote down; none for runs from before it did."""
    found = manifest.get("samples")
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
