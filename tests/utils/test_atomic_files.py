"""Atomic files and folders: complete or absent; links are not followed, old content is not lost."""

import json
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.child_processes import Child

from qlora.errors import QloraError
from qlora.utils import atomic_files, atomic_folders
from qlora.utils.atomic_files import is_bare_name, read_json, write_bytes, write_json, write_text
from qlora.utils.atomic_folders import REPLACED, atomic_folder, remove_leftovers


def fill(folder: Path, text: str) -> None:
    with atomic_folder(folder) as partial:
        write_text(partial / "a.txt", text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["exchange", "rename"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernel's exchange of two names, or two renames as on a file system without it."""
    if request.param == "rename":
        monkeypatch.setattr(atomic_folders, "exchange_names", lambda first, second: False)
    return str(request.param)


def test_a_folder_is_replaced_without_leftovers(method: str, tmp_path: Path) -> None:
    for text in ("one", "two", "three"):
        fill(tmp_path / "x", text)
        assert names(tmp_path) == ["x"] and (tmp_path / "x" / "a.txt").read_text() == text


def test_a_block_that_fails_leaves_the_old_folder(method: str, tmp_path: Path) -> None:
    fill(tmp_path / "x", "old")
    for error in (RuntimeError, KeyboardInterrupt, OSError(28, "No space left on device")):
        with pytest.raises((RuntimeError, KeyboardInterrupt, QloraError)), atomic_folder(tmp_path / "x") as partial:
            (partial / "a.txt").write_text("new")
            raise error
        assert names(tmp_path) == ["x"] and (tmp_path / "x" / "a.txt").read_text() == "old"


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    """Without an exchange of names the folder is missing for a moment; the next start restores the old one."""
    fill(tmp_path / "x", "old")
    os.rename(tmp_path / "x", tmp_path / f"{REPLACED}x")
    (tmp_path / ".partial-x").mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["x"] and (tmp_path / "x" / "a.txt").read_text() == "old"
    fill(tmp_path / f"{REPLACED}x", "older")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["x"] and (tmp_path / "x" / "a.txt").read_text() == "old"


def test_files_are_synced_before_they_are_renamed(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut loses content that is not synced before a rename, and renames in a folder that is not synced."""
    synced: dict[int, int] = {}
    unsynced_folders: set[Path] = set()
    rename, fsync = os.replace, os.fsync

    def recorded_fsync(handle: int) -> None:
        fsync(handle)
        status = os.fstat(handle)
        synced[status.st_ino] = status.st_size
        unsynced_folders.difference_update({p for p in unsynced_folders if p.stat().st_ino == status.st_ino})

    def recorded_rename(source: Any, target: Any) -> None:
        for path in [Path(source), *Path(source).rglob("*")]:
            if (".partial-" in path.name and not path.name.startswith(".partial-old-")) or path.is_file():
                assert path.stat().st_ino in synced, f"{path} was not synced"
            if path.is_file():
                assert synced[path.stat().st_ino] == path.stat().st_size
        rename(source, target)
        unsynced_folders.add(Path(target).parent)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_rename)
    monkeypatch.setattr(os, "rename", recorded_rename)
    for text in ("one", "two"):
        fill(tmp_path / "x", text)
        assert unsynced_folders <= {tmp_path / "x", tmp_path / ".partial-x"}, "a rename that a power cut may undo"


@pytest.mark.parametrize("size", [4096, 10**6])
def test_a_full_disk_loses_nothing_and_is_reported(size: int, tmp_path: Path) -> None:
    """A limit on file size simulates the full disk: the same call fails, half-way through."""

    def work(notify: Any) -> int:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        fill(tmp_path / "x", "old")
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        for write in (lambda: fill(tmp_path / "x", "y" * size), lambda: write_bytes(tmp_path / "f", b"y" * size)):
            try:
                write()
            except QloraError as error:
                assert error.exit_code == 1
                notify(str(error))
        return 0

    child = Child(work, tmp_path / "log")
    assert child.wait() == 0, (tmp_path / "log").read_text()
    lines = child.lines()
    assert len(lines) == 2
    assert all(f"{size:,} bytes could not be written" in line and str(tmp_path) in line for line in lines), lines
    assert "free there" in lines[0] and "Files that were saved before are intact" in lines[0]
    assert names(tmp_path) == ["log", "x"] and (tmp_path / "x" / "a.txt").read_text() == "old"


def test_a_link_at_the_path_is_not_followed(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "file").write_text("outside")
    for link in (".partial-f", "f"):
        (inside / link).symlink_to(outside / "file")
    write_text(inside / "f", "inside")
    assert (outside / "file").read_text() == "outside" and not (inside / "f").is_symlink()
    for link in (".partial-x", "x"):
        (inside / link).symlink_to(outside, target_is_directory=True)
    fill(inside / "x", "inside")
    assert names(outside) == ["file"] and not (inside / "x").is_symlink() and names(inside) == ["f", "x"]
    (inside / ".partial-y").symlink_to(outside, target_is_directory=True)
    remove_leftovers(inside)
    assert names(outside) == ["file"] and names(inside) == ["f", "x"]


@pytest.fixture(params=[0o022, 0o007, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_permissions_follow_the_umask(umask: int, tmp_path: Path) -> None:
    fill(tmp_path / "x", "text")
    assert stat.S_IMODE((tmp_path / "x" / "a.txt").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o777 & ~umask


def test_only_json_objects_of_bounded_size_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, None, "ü"]})
    assert read_json(path) == {"a": [1, None, "ü"]}
    for text in ("[1]", "{", "", "[" * 100_000, '{"a": ' * 100_000, "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError):
            read_json(path)
    path.write_text(json.dumps({"a": "x" * 1000}))
    monkeypatch.setattr(atomic_files, "MAX_JSON_BYTES", 1000)
    for missing in (path, tmp_path / "gone", tmp_path):
        with pytest.raises(ValueError):
            read_json(missing)


def test_only_bare_names_are_accepted() -> None:
    assert all(is_bare_name(name) for name in ("a", "a.safetensors", "model-00001-of-00002.safetensors", "..a", "ü"))
    bad = ("", ".", "..", "a/b", "/a", "../a", "a\\b", "C:a", "a\0", "a:b", None, 3, ["a"])
    assert not any(is_bare_name(name) for name in bad)
