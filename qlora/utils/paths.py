"""Paths that users write: a near name for one that does not exist, and whether a folder or a file can be written."""

import os
import shutil
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from qlora.errors import InputError

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
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        return str(error.strerror)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        return f"{existing} is not a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} is not writable for this user"
    return None


def require_writable_folder(folder: Path, name: str = "") -> Path:
    """`folder`. InputError, naming the option `name`, if it can't be created or written."""
    obstacle = write_obstacle(folder)
    if obstacle:
        where = f"{name}: " if name else ""
        raise InputError(f"{where}can't write {folder}: {obstacle}. Name a folder that can be written.")
    return folder


def require_writable_file(file: Path, name: str = "", new: bool = False) -> Path:
    """`file`. InputError, naming the option `name`, if it can't be written, or exists although it should be `new`."""
    where = f"{name}: {file}" if name else str(file)
    if file.is_dir():
        raise InputError(f"{where} is a folder. Name a file.")
    if new and os.path.lexists(file):
        raise InputError(f"{where} exists already, and is never overwritten. Name another file.")
    obstacle = write_obstacle(file.parent)
    if obstacle:
        raise InputError(f"{where} can't be written: {obstacle}. Name a file in a folder that can be written.")
    return file


def free_bytes(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(
        next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    ).free


def _names_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in islice(entries, MAX_NAMES)]
    except OSError:
        return []
