"""Paths that users write: a near name for one that does not exist, and whether a folder can be written."""

import os
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

MAX_NAMES = 10_000  # of a folder that are compared with a missing one


def similar_path(path: Path) -> str:
    """End of a message about a path that does not exist: a near name that does, else where relative paths start."""
    existing = next((parent for parent in path.parents if parent.is_dir()), None)
    if existing is not None:
        missing, *rest = path.relative_to(existing).parts
        near = get_close_matches(missing, _names_in(existing), n=1, cutoff=0.7)
        if near and existing.joinpath(near[0], *rest).exists():
            return f" Did you mean {existing.joinpath(near[0], *rest)}?"
    return "" if path.is_absolute() else f" Relative paths start at the folder the command runs in, {Path.cwd()}."


def write_obstacle(folder: Path) -> str | None:
    """Why a folder can't be created or written, or None. Writes nothing."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        return f"{existing} is not a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} is not writable for this user"
    return None


def _names_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in islice(entries, MAX_NAMES)]
    except OSError:
        return []
