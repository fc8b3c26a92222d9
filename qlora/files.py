"""How files reach the disk whole: written aside, synced, renamed; with the permissions the umask asks for."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qlora.errors import QloraError

try:
    import fcntl
except ImportError:  # Windows: two processes may both do what one would do alone
    fcntl = None  # type: ignore[assignment]

ASIDE = ".partial-"  # first letters of every name that is not finished yet; swept at the next start
KEY = "key"  # in a folder that is not finished: what it is to become


def write_bytes(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step: a reader sees the old file or the new one, never half of it.

    QloraError, with the path and the system's word, if the disk refuses; what was there before stays.
    """
    aside = path.with_name(ASIDE + path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_synced(aside, content)
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise QloraError(f"{path}: {len(content)} bytes could not be written: {error.strerror or error}.") from error


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` for JSON, indented, keys in the order given; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_of(path: Path) -> str:
    """The file's sha256, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_of(folder: Path, but: tuple[str, ...] = ()) -> dict[str, str]:
    """Name -> sha256 of every file directly in `folder`, those named in `but` left out."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith(ASIDE))
    return {file.name: sha256_of(file) for file in files if file.name not in but}


@contextmanager
def folder_in_one_step(path: Path, key: str | None = None) -> Iterator[Path]:
    """A folder to write into that becomes `path` at the end, or vanishes if the block fails. An old one goes last.

    With `key` what a block leaves when it fails or is killed is kept aside, and given to the next block of that key.
    """
    aside = path.with_name(ASIDE + path.name)
    if key is None or _key_of(aside) != key:
        shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True, exist_ok=True)
        if key is not None:
            write_text(aside / KEY, key)
        yield aside
        (aside / KEY).unlink(missing_ok=True)
        _sync_files(aside)
        if path.exists():
            shutil.rmtree(path)
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        _drop(aside, key)
        raise QloraError(f"{path} could not be written: {error.strerror or error}.") from error
    except BaseException:
        _drop(aside, key)
        raise


def _drop(aside: Path, key: str | None) -> None:
    if key is None:
        shutil.rmtree(aside, ignore_errors=True)


def _key_of(aside: Path) -> str | None:
    try:
        return (aside / KEY).read_text(encoding="utf-8")
    except OSError:
        return None


def sweep(folder: Path) -> list[str]:
    """Remove what an earlier, killed process left half-written; returns the names."""
    leftovers = sorted(folder.glob(ASIDE + "*")) if folder.is_dir() else []
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in leftovers]


@contextmanager
def alone(folder: Path, key: str) -> Iterator[None]:
    """Only one process at a time is inside for `key`; the lock goes with the process. OSError if there is no folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{key}.lock").open("w") as lock:
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cache_home(room: str) -> Path | None:
    """Where a room keeps what it can make again: in $QLORA_CACHE or the user's cache folder; None if that is empty."""
    named = os.environ.get("QLORA_CACHE")
    if named == "":
        return None
    return (Path(named).expanduser() if named else _user_cache() / "qlora") / room


def _user_cache() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_files(folder: Path) -> None:
    for file in folder.rglob("*"):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    sync_folder(folder)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
