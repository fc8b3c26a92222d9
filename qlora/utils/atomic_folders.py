"""How folders reach the disk whole: built aside, put in place in one step; what a killed process left is swept."""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora.utils.atomic_files import ASIDE, refused, sync_folder, write_text

KEY = "key"  # in a folder that is not finished: what it is to become
REPLACED = ".replaced-"  # of a folder that is about to be replaced; put back at the next start if that never happened
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def folder_in_one_step(path: Path, key: str | None = None) -> Iterator[Path]:
    """A folder to write into that becomes `path` at the end, or vanishes if the block fails. An old one goes last.

    With `key` what a block leaves when it fails or is killed is kept aside, and given to the next block of that key.
    """
    aside = path.with_name(ASIDE + path.name)
    try:
        if key is None or _key_of(aside) != key:
            remove(aside)
        aside.mkdir(parents=True, exist_ok=True)
        if key is not None:
            write_text(aside / KEY, key)
        yield aside
        (aside / KEY).unlink(missing_ok=True)
        _sync_files(aside)
        _put(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        failure = refused(path, _bytes_in(aside), error)
        _drop(aside, key)
        raise failure from error
    except BaseException:
        _drop(aside, key)
        raise
    with suppress(OSError):
        remove(aside)  # the old one, if the two changed places


def _drop(aside: Path, key: str | None) -> None:
    if key is None:
        shutil.rmtree(aside, ignore_errors=True)


def _key_of(aside: Path) -> str | None:
    try:
        return None if aside.is_symlink() else (aside / KEY).read_text(encoding="utf-8")
    except OSError:
        return None


def remove(path: Path) -> None:
    """Remove a file, a link or a folder; a folder's name goes first, so that what is left half-removed is swept."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        doomed = path if path.name.startswith(ASIDE) else path.with_name(f"{ASIDE}old-{path.name}")
        if doomed != path:
            os.replace(path, doomed)
        shutil.rmtree(doomed)


def sweep(folder: Path) -> list[str]:
    """Mend what an earlier, killed process left: half-written names go, a folder without its successor comes back."""
    there = folder.iterdir() if folder.is_dir() else ()
    leftovers = sorted(path for path in there if path.name.startswith((ASIDE, REPLACED)))
    for path in leftovers:
        original = path.with_name(path.name.removeprefix(REPLACED))
        with suppress(OSError):
            if path.name.startswith(REPLACED) and not os.path.lexists(original):
                os.replace(path, original)
            else:
                remove(path)
    return [path.name for path in leftovers]


def _put(aside: Path, path: Path) -> None:
    """Give `aside` the name `path`; where there is one already the two change places, or at least none is ever lost."""
    if not os.path.lexists(path):
        os.rename(aside, path)
    elif not _exchange(aside, path):
        old = path.with_name(REPLACED + path.name)
        remove(old)
        os.rename(path, old)
        try:
            os.rename(aside, path)
        except OSError:
            os.rename(old, path)
            raise
        remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where kernel or file system can't."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return swap is not None and not swap(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)


def _sync_files(folder: Path) -> None:
    for file in folder.rglob("*"):
        sync_folder(file)
    sync_folder(folder)


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
