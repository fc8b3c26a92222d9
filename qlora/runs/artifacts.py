"""The files of a run folder: their names, and the reader of the manifest. Imports no torch."""

from pathlib import Path
from typing import Any

from qlora.errors import InputError
from qlora.utils.atomic_files import read_json

RECIPE, MANIFEST, MODEL_CARD, PAGE = "recipe.yaml", "run.json", "README.md", "report.html"
SUSPECT = "suspect-adapter"  # folder with the adapter of a run that failed after its last step
NO_ADAPTER = "adapter.kind full trained every weight: this is a full model without an adapter."


def require_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished run. InputError for a folder without one."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder}: found no {MANIFEST}, allowed: a recipe file or a finished run.")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a run folder; None where there is no file. InputError if it is damaged."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        return read_json(path)
    except ValueError as error:
        raise InputError(f"{path}: is damaged ({error}). Use an intact copy of the folder, or train again.") from None
