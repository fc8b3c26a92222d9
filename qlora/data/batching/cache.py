"""Prepared data kept between runs: found by the content of everything it was made from, verified when it is read.

An entry is a folder of flat arrays (columns.py) with entry.json, which holds their sha256 and the report. It is written
aside and renamed, so a reader sees all of it or nothing; one that is damaged is made anew.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora.data.batching import column_store
from qlora.data.batching.column_store import Array, Columns, Unwritable
from qlora.utils.atomic_files import ASIDE, alone, cache_home
from qlora.utils.redact import redacted_values

DATA_PACKAGE = Path(__file__).parents[1]
UNUSED_DAYS = 30  # after which an entry is removed
_ENTRY = "entry.json"
_OURS = re.compile(rf"({re.escape(ASIDE)})?[0-9a-f]{{64}}(-\w+|\.lock)?")  # names that may be swept
_LIBRARIES = ("tokenizers", "transformers", "jinja2", "datasets", "numpy")  # whose code makes tokens out of rows

Report = Mapping[str, Any]
Build = Callable[[Columns], tuple[Mapping[str, Array], Report]]  # fills the columns; gives them back with a report


@dataclass(frozen=True)
class Entry:
    """Prepared data; `note` says where it comes from."""

    columns: Mapping[str, Array]
    report: Report
    note: str


def folder() -> Path | None:
    """Where entries are kept: data/ in $QLORA_CACHE or in the user's cache folder; None if $QLORA_CACHE is empty."""
    return cache_home("data")


def code_sha256(package: Path = DATA_PACKAGE) -> str:
    """A digest of this package's source files and of the libraries it uses: other code may give other tokens."""
    digest = hashlib.sha256(repr([(name, version(name)) for name in _LIBRARIES]).encode())
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def key_of(**inputs: Any) -> str:
    """The name of the entry made from `inputs` (JSON values) by this code."""
    text = json.dumps({**inputs, "code": code_sha256()}, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def entry(key: str, build: Build) -> Entry:
    """The entry of `key`, made by `build` unless it is kept already. Without a writable folder it is made in memory."""
    home = folder()
    if home is None:
        return _in_memory(build, "prepared data is not kept: QLORA_CACHE is empty")
    if found := _read(home / key):
        return found
    try:
        with _alone(home, key):  # processes that prepare the same data at the same time wait for the first one
            return _read(home / key) or _write(home / key, build)
    except Unwritable as error:
        return _in_memory(build, f"prepared data is not kept: {home} can't be written ({error.strerror})")


def _in_memory(build: Build, note: str) -> Entry:
    return Entry(*build(Columns(None)), note)


def _read(place: Path) -> Entry | None:
    """The entry at `place`; None if there is none that is whole."""
    try:
        text = (place / _ENTRY).read_text(encoding="utf-8")
        seal, _, body = text.partition("\n")
        if hashlib.sha256(body.encode()).hexdigest() != seal:
            return None
        known = json.loads(body)
        found = column_store.read(place, known["columns"])
    except (OSError, ValueError, KeyError):
        return None
    with suppress(OSError):
        os.utime(place / _ENTRY)
    return Entry(found, known["report"], f"data: prepared before, read from {place}")


def _write(place: Path, build: Build) -> Entry:
    """Build the entry aside, then put it in its place. Unwritable if the folder does not take it."""
    aside = _aside(place)
    store = Columns(aside)
    try:
        found, report = build(store)
        kept = redacted_values(report)  # its findings quote rows
        body = json.dumps({"columns": column_store.digests_of(aside), "report": kept}, ensure_ascii=True)
        _put(aside, place, f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}")
    except BaseException:
        store.close()
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return Entry(found, report, f"data: prepared, and kept in {place}")


def _aside(place: Path) -> Path:
    """An empty folder beside `place`; what others left there unfinished, or long unused, is swept away."""
    try:
        _sweep(place)
        return Path(tempfile.mkdtemp(prefix=f"{ASIDE}{place.name}-", dir=place.parent))
    except OSError as error:
        raise Unwritable(error.errno, error.strerror) from error


def _put(aside: Path, place: Path, text: str) -> None:
    try:
        (aside / _ENTRY).write_text(text, encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)  # a damaged one
        os.replace(aside, place)
    except OSError as error:
        raise Unwritable(error.errno, error.strerror) from error


def _sweep(place: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 86400
    for path in (path for path in place.parent.iterdir() if _OURS.fullmatch(path.name)):
        used = path / _ENTRY if (path / _ENTRY).exists() else path
        with suppress(OSError):
            if path.name.startswith(f"{ASIDE}{place.name}-") or used.stat().st_mtime < oldest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _alone(home: Path, key: str) -> Iterator[None]:
    """Only one process at a time is inside for `key`. Unwritable without a folder."""
    with ExitStack() as stack:
        try:
            stack.enter_context(alone(home, key))
        except OSError as error:
            raise Unwritable(error.errno, error.strerror) from error
        yield
