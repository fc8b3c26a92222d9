"""A lock on a folder: one process at a time writes into it. It ends with the process, and leaves no file.

A folder that the lock created and nothing was written into is removed again, with the parents that it created.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora.errors import InputError
from qlora.utils.atomic_files import write_error

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None  # type: ignore[assignment]

WAIT_SECONDS = 5.0  # for a process that is ending


@contextmanager
def locked_folder(folder: Path, setting: str, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold the lock of `folder`, which is created. InputError, naming the `setting`, if another process holds it."""
    if fcntl is None:
        yield
        return
    deadline = time.monotonic() + wait_seconds
    created: list[Path] = []
    try:
        while (handle := _open_locked(folder, created)) is None:
            if time.monotonic() >= deadline:
                raise InputError(
                    f"{setting}: another process is training in {folder}. Wait until it ends, or name another folder."
                )
            time.sleep(0.1)
    except OSError as error:
        raise write_error(folder, 0, error) from error
    try:
        yield
    finally:
        _remove_empty(created)  # with the lock: a waiting process then finds another folder, and creates its own
        os.close(handle)


def _open_locked(folder: Path, created: list[Path]) -> int | None:
    """A descriptor of `folder` with its lock; None if another process has it. Adds to `created`, deepest first."""
    created += [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    if _lock(handle) and is_open_at(handle, folder):
        return handle
    os.close(handle)
    return None


def _lock(handle: int) -> bool:
    """Whether the lock was taken; also true on a file system without locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def is_open_at(handle: int, folder: Path) -> bool:
    """Whether the open folder is the one at this path: the process that held its lock before may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), folder.stat())
    except FileNotFoundError:
        return False


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders up to the first that has an entry; each is followed by its parent."""
    for folder in folders:
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:  # not empty
            return
