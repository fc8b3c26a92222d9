"""`qlora report`: draw report.html again from run folders, one run or several on one page. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora.errors import InputError
from qlora.runs.artifacts import MANIFEST, RECIPE, read_manifest
from qlora.runs.benchmark_results import read_results
from qlora.runs.report.markup import Markup
from qlora.runs.report.page import report_page
from qlora.runs.report.run_data import RunData
from qlora.training.run_log import METRICS, read_metrics
from qlora.utils.atomic_files import write_text
from qlora.utils.paths import similar_path

MAX_RUNS = 12  # six colors, each as a solid and as a dashed line


def write_report_page(runs: Sequence[str], out: str, first: Markup | None = None) -> dict[str, Any]:
    """Write the page of these runs, `first` above its plots; returns its path, its bytes and the names of the runs.

    InputError if a folder is not a run, if a run is named twice, or if there are more runs than colors.
    """
    if len(runs) > MAX_RUNS:
        raise InputError(f"found {len(runs)} runs, allowed: at most {MAX_RUNS} on one page.")
    folders = [Path(run) for run in runs]
    paths = [folder.resolve() for folder in folders]
    duplicate = next((folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1), None)
    if duplicate is not None:
        raise InputError(f"{duplicate}: named twice. Name each run once.")
    names = distinct_names(folders)
    page = report_page([read_run_data(folder, name) for folder, name in zip(folders, names, strict=True)], first)
    write_text(Path(out), page)
    return {"path": out, "bytes": len(page.encode()), "runs": names}


def read_run_data(folder: Path, name: str) -> RunData:
    """What a page shows of a run, finished or in progress. InputError if the folder is not a run."""
    metrics = read_metrics(folder)
    manifest = read_manifest(folder) or {}
    if not metrics and not manifest:
        hint = "" if folder.is_dir() else similar_path(folder)
        raise InputError(f"{folder}: not a run. A run folder has {MANIFEST} or {METRICS}.{hint}")
    text, samples = _read_recipe_text(folder / RECIPE), _samples(manifest)
    return RunData(name, manifest, metrics, text, samples, read_results(folder))


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last name of each folder, with as many parent names as are needed to tell all folders apart."""
    paths = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({names[-depth:] for names in paths}) < len(paths):
        depth += 1
    return ["/".join(names[-depth:]) for names in paths]


def _read_recipe_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _samples(manifest: dict[str, Any]) -> list[dict[str, str]]:
    """The samples of a manifest; manifests of older versions have none."""
    samples = manifest.get("samples")
    return [sample for sample in samples if isinstance(sample, dict)] if isinstance(samples, list) else []
