"""What a source's path stands for: which files, in which order, or a hub name."""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora.data.types import Finding
from qlora.errors import DataError

if TYPE_CHECKING:
    from qlora.data import Source

TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TEXTS = (".txt",)
_KNOWN = ", ".join((*TABLES, *TEXTS))
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?$")
_STRAY = "not read: not a data file, or not of the kind of the others"
_HELD_OUT = ("test", "valid", "validation", "val", "eval", "dev")


@dataclass(frozen=True)
class Located:
    """What a source's path stands for: data files in reading order, or a hub name; and what was passed over."""

    files: tuple[str, ...]
    hub: str | None = None
    findings: tuple[Finding, ...] = ()


def locate(source: "Source") -> Located:
    """Find the files or the hub name that `source.path` means. DataError, naming the path, if it means nothing."""
    source = source.model_copy(update={"path": os.path.expanduser(source.path)})
    path = Path(source.path)
    if path.is_dir():
        return _folder(source, path)
    if path.exists():
        _refuse_odd_file(source.path, path)
        return Located(_of_split(source, [source.path]))
    if glob.has_magic(source.path):
        return _glob(source)
    if _HUB_NAME.match(source.path) and not source.path.endswith((*TABLES, *TEXTS)):
        return Located((), hub=source.path)
    raise DataError(
        f"{source.path}: no such file or folder. Allowed: a file ({_KNOWN}), a folder of them, a glob, or a hub name "
        "like owner/name. Relative paths start at the folder the command runs in."
    )


def _folder(source: "Source", folder: Path) -> Located:
    """All data files inside. Text files count only where no tables are, so that a licence is not learnt as data."""
    inside = [path for path in sorted(folder.rglob("*")) if not _hidden(path.relative_to(folder)) and not path.is_dir()]
    tables = [path for path in inside if path.suffix.lower() in TABLES and path.is_file()]
    picked = tables or [path for path in inside if path.suffix.lower() in TEXTS and path.is_file()]
    if not picked:
        raise DataError(f"{source.path}: no data file in this folder. Allowed: {_KNOWN}.")
    strays = [Finding(_spelt(source, folder, path), _STRAY) for path in inside if path not in picked]
    names = _of_split(source, [_spelt(source, folder, path) for path in picked])
    return Located(names, findings=(*strays, *_held_out(source, names)))


def _glob(source: "Source") -> Located:
    found = [name for name in sorted(glob.glob(source.path, recursive=True)) if Path(name).is_file()]
    if not found:
        raise DataError(f"{source.path}: this pattern matches no file.")
    strays = [Finding(name, _STRAY) for name in found if not _is_data(name)]
    if len(strays) == len(found):
        raise DataError(f"{source.path}: no data file matches. Allowed: {_KNOWN}.")
    return Located(_of_split(source, [name for name in found if _is_data(name)]), findings=tuple(strays))


def _spelt(source: "Source", folder: Path, path: Path) -> str:
    """`path` as the user would write it: the folder's own spelling in front."""
    return f"{source.path.rstrip('/')}/{path.relative_to(folder).as_posix()}"


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _is_data(name: str) -> bool:
    return Path(name).suffix.lower() in (*TABLES, *TEXTS)


def _refuse_odd_file(name: str, path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{name}: not a regular file (a pipe or a device). Allowed: a file ({_KNOWN}) or a folder.")
    if not _is_data(name):
        raise DataError(f"{name}: unknown kind of file {path.suffix!r}. Allowed: {_KNOWN}.")
    if path.stat().st_size == 0:
        raise DataError(f"{name}: the file is empty.")


def _of_split(source: "Source", names: Sequence[str]) -> tuple[str, ...]:
    """The files of the split: stem `train`, or shards like train-00000-of-00004."""
    if source.split is None:
        return tuple(names)
    stems = [Path(name).stem for name in names]
    kept = [name for name, stem in zip(names, stems, strict=True) if source.split in (stem, stem.split("-")[0])]
    if not kept:
        raise DataError(f"{source.path}: no file of split {source.split!r}. Found: {', '.join(sorted(set(stems)))}.")
    return tuple(kept)


def _held_out(source: "Source", names: Sequence[str]) -> list[Finding]:
    stems = {Path(name).stem.split("-")[0].lower() for name in names}
    if source.split is not None or not stems.intersection(_HELD_OUT) or stems.issubset(_HELD_OUT):
        return []
    read_too = ", ".join(sorted(stems.intersection(_HELD_OUT)))
    return [Finding(source.path, f"the folder's {read_too} files are read as well; name a split to leave them out")]
