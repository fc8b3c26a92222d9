"""The files of a run folder: their names, and the reader of the manifest. Imports no torch."""

from pathlib import Path
from typing import Any

from qlora.errors import InputError
from qlora.utils.atomic_files import read_json

RECIPE, MANIFEST, MODEL_CARD, PAGE = "recipe.yaml", "run.json", "README.md", "report.html"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a run folder; None where there is no file. InputError if it is damaged."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        return read_json(path)
    except ValueError as error:
        raise InputError(f"{path}: is damaged ({error}).") from None
