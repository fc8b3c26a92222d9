"""How files reach the disk whole: written aside, synced, renamed; with the permissions the umask asks for.

Text is redacted on its way: no token or key stays in a file (redact.py).
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
except ImportError:  # Windows: two processes may both do what one would do alone
    fcntl = None  # type: ignore[assignment]

ASIDE = ".partial-"  # first letters of every name that is not finished yet; swept at the next start
MAX_JSON_BYTES = 2**28


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
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise refused(path, len(content), error) from error


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text, secrets taken out."""
    write_bytes(path, redacted(text).encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` for JSON, indented, keys in the order given, secrets taken out; NaN is refused."""
    text = json.dumps(redacted_values(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode("utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of bounded size. ValueError, with the reason, for anything else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError) as error:
        raise ValueError(getattr(error, "strerror", None) or "nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__}, not an object")
    return found


def plain_name(name: Any) -> bool:
    """Whether `name`, found in a file, is the bare name of a file: it can't lead out of its folder on any system."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(sign in name for sign in "/\\:\0")


def refused(path: Path, size: int, error: OSError) -> QloraError:
    """The error of a disk that does not take `size` bytes for `path`."""
    free = ""
    with suppress(OSError):
        folder = next(parent for parent in path.absolute().parents if parent.is_dir())
        free = f" ({shutil.disk_usage(folder).free:,} bytes are free there)"
    return QloraError(
        f"{path}: {size:,} bytes could not be written: {error.strerror or error}{free}. What was saved before is whole."
    )


def sha256_of(path: Path) -> str:
    """The file's sha256, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_of(folder: Path, but: tuple[str, ...] = ()) -> dict[str, str]:
    """Name -> sha256 of every file directly in `folder`, those named in `but` left out."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith(ASIDE))
    return {file.name: sha256_of(file) for file in files if file.name not in but}


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


def _write_synced(path: Path, content: bytes) -> None:
    with suppress(FileNotFoundError):
        path.unlink()  # a leftover, or a link that somebody put there: it is not followed
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
