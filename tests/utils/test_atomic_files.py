"""Files and folders reach the disk whole, or not at all; what is there is never followed, and never lost."""

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
from qlora.utils.atomic_files import plain_name, read_json, write_bytes, write_json, write_text
from qlora.utils.atomic_folders import REPLACED, folder_in_one_step, sweep


def fill(folder: Path, text: str) -> None:
    with folder_in_one_step(folder) as aside:
        write_text(aside / "a.txt", text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["exchange", "rename"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the kernel's exchange of two names, and on a file system that has none."""
    if request.param == "rename":
        monkeypatch.setattr(atomic_folders, "_exchange", lambda one, other: False)
    return str(request.param)


def test_a_folder_is_replaced_and_nothing_is_left_beside_it(way: str, tmp_path: Path) -> None:
    for text in ("one", "two", "three"):
        fill(tmp_path / "x", text)
        assert names(tmp_path) == ["x"] and (tmp_path / "x" / "a.txt").read_text() == text


def test_a_block_that_fails_leaves_the_old_folder(way: str, tmp_path: Path) -> None:
    fill(tmp_path / "x", "old")
    for error in (RuntimeError, KeyboardInterrupt, OSError(28, "No space left on device")):
        with pytest.raises((RuntimeError, KeyboardInterrupt, QloraError)), folder_in_one_step(tmp_path / "x") as aside:
            (aside / "a.txt").write_text("new")
            raise error
        assert names(tmp_path) == ["x"] and (tmp_path / "x" / "a.txt").read_text() == "old"


def test_a_death_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    """Where names can't be exchanged there is a moment without the folder; the next start puts the old one back."""
    fill(tmp_path / "x", "old")
    os.rename(tmp_path / "x", tmp_path / f"{REPLACED}x")
    (tmp_path / ".partial-x").mkdir()
    sweep(tmp_path)
    assert names(tmp_path) == ["x"] and (tmp_path / "x" / "a.txt").read_text() == "old"
    fill(tmp_path / f"{REPLACED}x", "older")
    sweep(tmp_path)
    assert names(tmp_path) == ["x"] and (tmp_path / "x" / "a.txt").read_text() == "old"


def test_everything_is_synced_before_it_gets_its_name(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut may lose: contents not synced before a rename, and renames whose folder is not synced after."""
    synced: dict[int, int] = {}
    unsynced_folders: set[Path] = set()
    rename, fsync = os.replace, os.fsync

    def noted_fsync(handle: int) -> None:
        fsync(handle)
        found = os.fstat(handle)
        synced[found.st_ino] = found.st_size
        unsynced_folders.difference_update({p for p in unsynced_folders if p.stat().st_ino == found.st_ino})

    def noted_rename(source: Any, target: Any) -> None:
        for path in [Path(source), *Path(source).rglob("*")]:
            if (".partial-" in path.name and not path.name.startswith(".partial-old-")) or path.is_file():
                assert path.stat().st_ino in synced, f"{path} was not synced"
            if path.is_file():
                assert synced[path.stat().st_ino] == path.stat().st_size
        rename(source, target)
        unsynced_folders.add(Path(target).parent)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_rename)
    monkeypatch.setattr(os, "rename", noted_rename)
    for text in ("one", "two"):
        fill(tmp_path / "x", text)
        assert unsynced_folders <= {tmp_path / "x", tmp_path / ".partial-x"}, "a rename that a power cut may undo"


@pytest.mark.parametrize("size", [4096, 10**6])
def test_a_disk_that_is_full_costs_nothing_and_is_named(size: int, tmp_path: Path) -> None:
    """A limit on file size stands in for the full disk: the same call fails, half-way through."""

    def work(tell: Any) -> int:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        fill(tmp_path / "x", "old")
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        for write in (lambda: fill(tmp_path / "x", "y" * size), lambda: write_bytes(tmp_path / "f", b"y" * size)):
            try:
                write()
            except QloraError as error:
                assert error.exit_code == 1
                tell(str(error))
        return 0

    child = Child(work, tmp_path / "said")
    assert child.end() == 0, (tmp_path / "said").read_text()
    lines = child.lines()
    assert len(lines) == 2
    assert all(f"{size:,} bytes could not be written" in line and str(tmp_path) in line for line in lines), lines
    assert "free there" in lines[0] and "What was saved before is whole" in lines[0]
    assert names(tmp_path) == ["said", "x"] and (tmp_path / "x" / "a.txt").read_text() == "old"


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    outside, home = tmp_path / "outside", tmp_path / "home"
    outside.mkdir()
    home.mkdir()
    (outside / "file").write_text("theirs")
    for link in (".partial-f", "f"):
        (home / link).symlink_to(outside / "file")
    write_text(home / "f", "ours")
    assert (outside / "file").read_text() == "theirs" and not (home / "f").is_symlink()
    for link in (".partial-x", "x"):
        (home / link).symlink_to(outside, target_is_directory=True)
    fill(home / "x", "ours")
    assert names(outside) == ["file"] and not (home / "x").is_symlink() and names(home) == ["f", "x"]
    (home / ".partial-y").symlink_to(outside, target_is_directory=True)
    sweep(home)
    assert names(outside) == ["file"] and names(home) == ["f", "x"]


@pytest.fixture(params=[0o022, 0o007, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_permissions_are_what_the_umask_asks_for(umask: int, tmp_path: Path) -> None:
    fill(tmp_path / "x", "text")
    assert stat.S_IMODE((tmp_path / "x" / "a.txt").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o777 & ~umask


def test_json_is_read_only_as_an_object_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_only_a_bare_name_is_a_name() -> None:
    assert all(plain_name(name) for name in ("a", "a.safetensors", "model-00001-of-00002.safetensors", "..a", "ü"))
    bad = ("", ".", "..", "a/b", "/a", "../a", "a\\b", "C:a", "a\0", "a:b", None, 3, ["a"])
    assert not any(plain_name(name) for name in bad)
