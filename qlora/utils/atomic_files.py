"""Atomic files: written under a temporary name, synced and renamed; a reader never sees half a file.

Text is redacted before it is written (redact.py). Permissions are what the umask allows.
"""

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
from qlora.utils.redact import redacted, redacted_values

try:
    import fcntl
except ImportError:  # Windows: two processes may both do the work of one
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial-"  # prefix of every name that is not finished; removed at the next start
MAX_JSON_BYTES = 2**28


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file at `path` in one step: a reader sees the old content or the new one.

    QloraError with the path and the system's message if the disk refuses; the old file stays.
    """
    partial = path.with_name(PARTIAL + path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_synced(partial, content)
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise write_error(path, len(content), error) from error


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text, redacted."""
    write_bytes(path, redacted(text).encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` for JSON, indented and redacted, keys in the given order; NaN is refused."""
    text = json.dumps(redacted_values(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode("utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of bounded size. ValueError, with the reason, for anything else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError) as error:
        raise ValueError(getattr(error, "strerror", None) or "nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}, not an object")
    return value


def is_bare_name(name: Any) -> bool:
    """Whether `name`, read from a file, is the bare name of a file: on no system does it lead out of its folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(sign in name for sign in "/\\:\0")


def write_error(path: Path, size: int, error: OSError) -> QloraError:
    """The error for `size` bytes that the disk did not take for `path`."""
    free = ""
    with suppress(OSError):
        folder = next(parent for parent in path.absolute().parents if parent.is_dir())
        free = f" ({shutil.disk_usage(folder).free:,} bytes are free there)"
    return QloraError(
        f"{path}: {size:,} bytes could not be written: {error.strerror or error}{free}. "
        "Files that were saved before are intact. Correct this, and run the command again."
    )


def sha256_of(path: Path) -> str:
    """The file's sha256, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_manifest(folder: Path, exclude: tuple[str, ...] = ()) -> dict[str, str]:
    """Name -> sha256 of every file directly in `folder`, except `exclude` and partial files."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith(PARTIAL))
    return {file.name: sha256_of(file) for file in files if file.name not in exclude}


@contextmanager
def exclusive_lock(folder: Path, key: str) -> Iterator[None]:
    """One process at a time holds the lock for `key`, until it leaves or exits. OSError if there is no folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{key}.lock").open("w") as lock:
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cache_folder(name: str) -> Path | None:
    """The folder `name` in $QLORA_CACHE or the user's cache; None if that variable is empty."""
    variable = os.environ.get("QLORA_CACHE")
    if variable == "":
        return None
    return (Path(variable).expanduser() if variable else _user_cache() / "qlora") / name


def _user_cache() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut. Windows can't sync a folder; its file system logs renames."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_synced(path: Path, content: bytes) -> None:
    with suppress(FileNotFoundError):
        path.unlink()  # a leftover, or a link that somebody put there: it is not followed
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
