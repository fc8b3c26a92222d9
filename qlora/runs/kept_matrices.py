"""`quant.keep: auto` at the start of a run: measured once, written into the run folder, and reused when it resumes."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from qlora.model.download import find_model
from qlora.recipe.recipe import Recipe
from qlora.runs.memory_setup import Log
from qlora.runs.sensitivity import Sensitivity, measure_sensitivity
from qlora.utils.atomic_files import read_json, write_json

SENSITIVITY = "sensitivity.json"
WAIT_SECONDS = 0.5  # between looks of other ranks for the first one's choice


def with_kept_matrices(recipe: Recipe, output: Path, log: Log = lambda line: None) -> Recipe:
    """The recipe with the names of the matrices that `quant.keep: auto` means; others are returned unchanged.

    Of several ranks on a machine the first one measures, and the others wait for its file. Errors of
    `measure_sensitivity`.
    """
    if recipe.quant.keep != "auto":
        return recipe
    path, key = output / SENSITIVITY, _key(recipe)
    kept = _read(path, key)
    while kept is None and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(WAIT_SECONDS)  # the launcher ends this rank if the first one fails
        kept = _read(path, key)
    if kept is None:
        result = measure_sensitivity(recipe, log)
        log(f"quant.keep auto: {result}")
        _write(path, key, result)
        kept = list(result.kept)
    else:
        log(f"quant.keep auto: {len(kept)} matrices, as measured before ({path})")
    return recipe.model_copy(update={"quant": recipe.quant.model_copy(update={"keep": tuple(kept)})})


def kept_summary(recipe: Recipe, output: Path) -> dict[str, Any]:
    """`kept_matrices` of a run's manifest: KL, bytes and number; empty unless they were chosen for this run."""
    try:
        values: dict[str, Any] = read_json(output / SENSITIVITY)
        if not recipe.quant.keep or list(recipe.quant.keep) != values["kept"]:
            return {}
        figures = {key: values[key] for key in ("kl_before", "kl_after", "bytes")}
        return {"kept_matrices": {"matrices": len(values["kept"]), **figures}}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _key(recipe: Recipe) -> str:
    """Identifies what a choice depends on: the settings, and the files of the base."""
    folder = find_model(recipe.model.name, recipe.model.revision).path
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    sections = [section.model_dump(mode="json") for section in (recipe.model, recipe.quant, recipe.data)]
    values = [sections, recipe.train.seed, recipe.objective.kind, list(recipe.adapter.new_tokens), stamps]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _read(path: Path, key: str) -> list[str] | None:
    """The names in a file of the same choice; None if there is no such file."""
    try:
        values: dict[str, Any] = read_json(path)
        return [str(name) for name in values["kept"]] if values["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, key: str, result: Sensitivity) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"key": key, **result.as_json()})
