"""Atomic folders: written under a temporary name, put at their path in one step; leftovers of a killed process go."""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora.errors import InputError
from qlora.utils.atomic_files import PARTIAL, sync_folder, write_error, write_text
from qlora.utils.paths import require_writable_folder

KEY = "key"  # file in an unfinished folder: identifies the content that it will have
REPLACED = ".replaced-"  # prefix of a folder that is being replaced; restored at the next start if that failed
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def atomic_folder(path: Path, key: str | None = None) -> Iterator[Path]:
    """A folder to write into that becomes `path` at the end, or is removed if the block fails.

    An old folder at `path` is removed last. With `key`, what a failed or killed block has written is kept, and given
    to the next block with that key.
    """
    partial = path.with_name(PARTIAL + path.name)
    try:
        if key is None or _key_of(partial) != key:
            remove(partial)
        partial.mkdir(parents=True, exist_ok=True)
        if key is not None:
            write_text(partial / KEY, key)
        yield partial
        (partial / KEY).unlink(missing_ok=True)
        _sync_files(partial)
        _replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        failure = write_error(path, _bytes_in(partial), error)
        _discard(partial, key)
        raise failure from error
    except BaseException:
        _discard(partial, key)
        raise
    with suppress(OSError):
        remove(partial)  # the old folder, if the two exchanged names


def require_new_folder(path: Path) -> Path:
    """`path`, if nothing is there or an empty folder, and it can be written. InputError otherwise."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists already. Name a folder that does not exist yet.")
    return require_writable_folder(path)


def _discard(partial: Path, key: str | None) -> None:
    if key is None:
        shutil.rmtree(partial, ignore_errors=True)


def _key_of(partial: Path) -> str | None:
    try:
        return None if partial.is_symlink() else (partial / KEY).read_text(encoding="utf-8")
    except OSError:
        return None


def remove(path: Path) -> None:
    """Remove a file, a link or a folder. A folder is renamed first, so that a half-removed one is a leftover."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        doomed = path if path.name.startswith(PARTIAL) else path.with_name(f"{PARTIAL}old-{path.name}")
        if doomed != path:
            os.replace(path, doomed)
        shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> list[str]:
    """Clean up after a killed process: remove partial names, restore a folder whose replacement is missing."""
    paths = folder.iterdir() if folder.is_dir() else ()
    leftovers = sorted(path for path in paths if path.name.startswith((PARTIAL, REPLACED)))
    for path in leftovers:
        original = path.with_name(path.name.removeprefix(REPLACED))
        with suppress(OSError):
            if path.name.startswith(REPLACED) and not os.path.lexists(original):
                os.replace(path, original)
            else:
                remove(path)
    return [path.name for path in leftovers]


def _replace(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`; an old folder there exchanges names with it, or is kept until the new one exists."""
    if not os.path.lexists(path):
        os.rename(partial, path)
    elif not exchange_names(partial, path):
        old = path.with_name(REPLACED + path.name)
        remove(old)
        os.rename(path, old)
        try:
            os.rename(partial, path)
        except OSError:
            os.rename(old, path)
            raise
        remove(old)


def exchange_names(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where kernel or file system can't."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return not rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE)


def _sync_files(folder: Path) -> None:
    for file in folder.rglob("*"):
        sync_folder(file)
    sync_folder(folder)


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
