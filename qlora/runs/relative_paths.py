"""Relative paths in a run's recipe, when the run is opened from another folder than it was trained in.

They started at the folder that `qlora train` ran in, which usually is above the run. So a path that does not exist
here is looked for in the folders above the run, the nearest first. An adapter's fingerprint still refuses another base.
"""

import glob
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora.data import Source
from qlora.recipe.recipe import Recipe

Log = Callable[[str], None]


def locate_paths(recipe: Recipe, run: Path, log: Log) -> Recipe:
    """The recipe with its base model, data and template as they are found from `run`; a line is logged for a change."""
    folders: dict[Path, None] = {}

    def locate(path: str) -> str:
        folder = folder_of(path, run)
        if folder is None:
            return path
        folders[folder] = None
        return str(folder / path)

    def sources(settings: Sequence[Source]) -> tuple[Source, ...]:
        return tuple(source.model_copy(update={"path": locate(source.path)}) for source in settings)

    model, data = recipe.model, recipe.data
    names = {"name": locate(model.name)}
    if model.chat_template != "auto":
        names["chat_template"] = locate(model.chat_template)
    paths = {"train": sources(data.train), "eval": data.eval and sources(data.eval)}
    for folder in folders:
        log(f"{run}: trained in another folder than this; relative paths of its recipe are read from {folder}")
    sections = {"model": model.model_copy(update=names), "data": data.model_copy(update=paths)}
    return recipe.model_copy(update=sections)


def folder_of(path: str, run: Path) -> Path | None:
    """The folder above `run` in which a relative path exists; None if it exists here, or in none, or is absolute."""
    written = Path(path).expanduser()
    fixed = _before_pattern(written)
    if written.is_absolute() or fixed.exists() or fixed == Path():
        return None
    above = dict.fromkeys([*Path(os.path.abspath(run)).parents, *run.resolve().parents])
    return next((folder for folder in above if (folder / fixed).exists()), None)


def _before_pattern(path: Path) -> Path:
    """The part of a path before its first glob pattern; all of a path that exists."""
    if path.exists():
        return path
    fixed = Path()
    for part in path.parts:
        if glob.has_magic(part):
            break
        fixed = fixed / part
    return fixed
