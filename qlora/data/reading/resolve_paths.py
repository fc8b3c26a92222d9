"""The path of a data source resolved to data files in reading order, or to a hub name."""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora.data.types import Finding
from qlora.errors import DataError, did_you_mean
from qlora.utils.paths import similar_path

if TYPE_CHECKING:
    from qlora.data import Source

TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TEXT_SUFFIXES = (".txt",)
_ALLOWED = ", ".join((*TABLE_SUFFIXES, *TEXT_SUFFIXES))
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?$")
_EVAL_STEMS = ("test", "valid", "validation", "val", "eval", "dev")

# Messages of findings are part of the cache key.
_NOT_READ = "not read: not a data file, or not of the kind of the others"


@dataclass(frozen=True)
class ResolvedSource:
    """Data files in reading order, or a hub name, and findings about files that are not read."""

    files: tuple[str, ...]
    hub: str | None = None
    findings: tuple[Finding, ...] = ()


def resolve_source(source: "Source") -> ResolvedSource:
    """The files or the hub name of `source.path`. DataError, with the path, if there are none."""
    source = source.model_copy(update={"path": os.path.expanduser(source.path)})
    path = Path(source.path)
    if path.is_dir():
        return _folder(source, path)
    if path.exists():
        _require_data_file(source.path, path)
        return ResolvedSource(_files_of_split(source, [source.path]))
    if glob.has_magic(source.path):
        return _glob(source)
    if _HUB_NAME.match(source.path) and not source.path.endswith((*TABLE_SUFFIXES, *TEXT_SUFFIXES)):
        return ResolvedSource((), hub=source.path)
    raise DataError(
        f"{source.path}: no such file or folder. Allowed: a file ({_ALLOWED}), a folder of them, a glob, or a hub name "
        f"like owner/name.{similar_path(path)}"
    )


def _folder(source: "Source", folder: Path) -> ResolvedSource:
    """All data files in a folder. Text files are read only if there are no tables: they may be a license."""
    paths = [
        path for path in sorted(folder.rglob("*")) if not _is_hidden(path.relative_to(folder)) and not path.is_dir()
    ]
    tables = [path for path in paths if path.suffix.lower() in TABLE_SUFFIXES and path.is_file()]
    data_files = tables or [path for path in paths if path.suffix.lower() in TEXT_SUFFIXES and path.is_file()]
    if not data_files:
        raise DataError(f"{source.path}: no data file in this folder. Allowed: {_ALLOWED}.")
    not_read = [Finding(_user_path(source, folder, path), _NOT_READ) for path in paths if path not in data_files]
    names = _files_of_split(source, [_user_path(source, folder, path) for path in data_files])
    return ResolvedSource(names, findings=(*not_read, *_eval_file_findings(source, names)))


def _glob(source: "Source") -> ResolvedSource:
    path = Path(source.path)
    names = [name for name in sorted(glob.glob(source.path, recursive=True)) if Path(name).is_file()]
    if not names:
        raise DataError(f"{source.path}: this pattern matches no file. Allowed: {_ALLOWED}.{similar_path(path)}")
    not_read = [Finding(name, _NOT_READ) for name in names if not _is_data(name)]
    if len(not_read) == len(names):
        raise DataError(f"{source.path}: no data file matches. Allowed: {_ALLOWED}.")
    return ResolvedSource(_files_of_split(source, [name for name in names if _is_data(name)]), findings=tuple(not_read))


def _user_path(source: "Source", folder: Path, path: Path) -> str:
    """`path` below the folder as the recipe names it."""
    return f"{source.path.rstrip('/')}/{path.relative_to(folder).as_posix()}"


def _is_hidden(path: Path) -> bool:
    return any(name.startswith((".", "_")) for name in path.parts)


def _is_data(name: str) -> bool:
    return Path(name).suffix.lower() in (*TABLE_SUFFIXES, *TEXT_SUFFIXES)


def _require_data_file(name: str, path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{name}: not a regular file (a pipe or a device). Allowed: a file ({_ALLOWED}) or a folder.")
    if not _is_data(name):
        raise DataError(f"{name}: unknown kind of file {path.suffix!r}. Allowed: {_ALLOWED}.")
    if path.stat().st_size == 0:
        raise DataError(f"{name}: the file is empty. Name a file with records.")


def _files_of_split(source: "Source", names: Sequence[str]) -> tuple[str, ...]:
    """The files of source.split: those with the stem `train`, say, or shards like train-00000-of-00004."""
    if source.split is None:
        return tuple(names)
    stems = [Path(name).stem for name in names]
    matches = [name for name, stem in zip(names, stems, strict=True) if source.split in (stem, stem.split("-")[0])]
    if not matches:
        raise DataError(f"{source.path}: no file of split {source.split!r}.{did_you_mean(source.split, set(stems))}")
    return tuple(matches)


def _eval_file_findings(source: "Source", names: Sequence[str]) -> list[Finding]:
    """A finding about test and validation files that are read with the others."""
    stems = {Path(name).stem.split("-")[0].lower() for name in names}
    if source.split is not None or not stems.intersection(_EVAL_STEMS) or stems.issubset(_EVAL_STEMS):
        return []
    eval_stems = ", ".join(sorted(stems.intersection(_EVAL_STEMS)))
    return [Finding(source.path, f"the folder's {eval_stems} files are read as well; name a split to leave them out")]
