"""The cache of prepared data: found by a digest of everything that the data depends on, verified when it is read.

An entry is a folder of flat arrays (column_store.py) with entry.json, which holds their sha256 and the report. It is
written to a temporary folder and renamed, so a reader never sees half of it. A damaged entry is built again.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora.data.batching import column_store
from qlora.data.batching.column_store import Array, Columns, ColumnWriteError
from qlora.utils.atomic_files import PARTIAL, cache_folder, exclusive_lock
from qlora.utils.redact import redacted_values

DATA_PACKAGE = Path(__file__).parents[1]
UNUSED_DAYS = 30  # after which an entry is removed
_ENTRY = "entry.json"
_REMOVABLE = re.compile(rf"({re.escape(PARTIAL)})?[0-9a-f]{{64}}(-\w+|\.lock)?")  # names that this module creates
_LIBRARIES = ("tokenizers", "transformers", "jinja2", "datasets", "numpy")  # whose versions may change token ids

Report = Mapping[str, Any]
Build = Callable[[Columns], tuple[Mapping[str, Array], Report]]  # writes the columns; returns them with a report


@dataclass(frozen=True)
class Entry:
    """Prepared data. `note` tells the user where it is from."""

    columns: Mapping[str, Array]
    report: Report
    note: str


def code_sha256(package: Path = DATA_PACKAGE) -> str:
    """A digest of this package's source files and of its libraries' versions: other code may give other tokens."""
    digest = hashlib.sha256(repr([(name, version(name)) for name in _LIBRARIES]).encode())
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def _own_code_sha256() -> str:
    """`code_sha256` of the code that this process runs, read once."""
    return code_sha256()


def cache_key(**inputs: Any) -> str:
    """The name of the entry that this code builds from `inputs` (JSON values)."""
    text = json.dumps({**inputs, "code": _own_code_sha256()}, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def get_or_build(key: str, build: Build) -> Entry:
    """The entry `key`, from the cache or else from `build`. It is in memory if the cache can't be written."""
    folder = cache_folder("data")
    if folder is None:
        return _in_memory(build, "prepared data is not kept: QLORA_CACHE is empty")
    if entry := _read(folder / key):
        return entry
    try:
        with _lock(folder, key):  # processes that prepare the same data wait for the first one
            return _read(folder / key) or _write(folder / key, build)
    except ColumnWriteError as error:
        return _in_memory(build, f"prepared data is not kept: {folder} can't be written ({error.strerror})")


def _in_memory(build: Build, note: str) -> Entry:
    return Entry(*build(Columns(None)), note)


def _read(path: Path) -> Entry | None:
    """The entry at `path`; None if there is none or it is damaged."""
    try:
        text = (path / _ENTRY).read_text(encoding="utf-8")
        digest, _, body = text.partition("\n")
        if hashlib.sha256(body.encode()).hexdigest() != digest:
            return None
        content = json.loads(body)
        columns = column_store.read(path, content["columns"])
    except (OSError, ValueError, KeyError):
        return None
    with suppress(OSError):
        os.utime(path / _ENTRY)
    return Entry(columns, content["report"], f"data: prepared before, read from {path}")


def _write(path: Path, build: Build) -> Entry:
    """Build the entry in a temporary folder and rename it to `path`. ColumnWriteError if it can't be written."""
    temporary = _temporary_folder(path)
    store = Columns(temporary)
    try:
        columns, report = build(store)
        redacted = redacted_values(report)  # its findings quote records
        body = json.dumps({"columns": column_store.digests_of(temporary), "report": redacted}, ensure_ascii=True)
        _commit(temporary, path, f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")
    except BaseException:
        store.close()
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Entry(columns, report, f"data: prepared, and kept in {path}")


def _temporary_folder(path: Path) -> Path:
    """An empty folder next to `path`, after abandoned and long unused ones are removed."""
    try:
        _remove_old(path)
        return Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{path.name}-", dir=path.parent))
    except OSError as error:
        raise ColumnWriteError(error.errno, error.strerror) from error


def _commit(temporary: Path, path: Path, text: str) -> None:
    try:
        (temporary / _ENTRY).write_text(text, encoding="utf-8")
        shutil.rmtree(path, ignore_errors=True)  # a damaged entry
        os.replace(temporary, path)
    except OSError as error:
        raise ColumnWriteError(error.errno, error.strerror) from error


def _remove_old(entry: Path) -> None:
    """Remove unfinished folders of `entry`, and entries that were not used for UNUSED_DAYS."""
    oldest = time.time() - UNUSED_DAYS * 86400
    for path in (path for path in entry.parent.iterdir() if _REMOVABLE.fullmatch(path.name)):
        used = path / _ENTRY if (path / _ENTRY).exists() else path
        with suppress(OSError):
            if path.name.startswith(f"{PARTIAL}{entry.name}-") or used.stat().st_mtime < oldest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _lock(folder: Path, key: str) -> Iterator[None]:
    """One process at a time holds the lock for `key`. ColumnWriteError if there is no folder."""
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive_lock(folder, key))
        except OSError as error:
            raise ColumnWriteError(error.errno, error.strerror) from error
        yield
