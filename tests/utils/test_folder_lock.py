"""The lock on a run folder: a second process is refused, a process that ended holds none, and nothing is left."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qlora.errors import InputError
from qlora.utils.folder_lock import is_open_at, locked_folder

HOLD = """
import sys
from pathlib import Path
from qlora.utils.folder_lock import locked_folder
with locked_folder(Path(sys.argv[1]), "train.output"):
    print("locked", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> "subprocess.Popen[str]":
    """A process that holds the lock of `folder` until its stdin is closed or it is killed."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "locked\n"
    return process


def test_a_second_process_is_refused_until_the_first_one_ends(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    process = hold(folder)
    message = r"train.output: another process is training in .*runs/a. Wait until it ends"
    with pytest.raises(InputError, match=message), locked_folder(folder, "train.output", wait_seconds=0.2):
        pass
    process.kill()
    process.wait()
    with locked_folder(folder, "train.output", wait_seconds=5.0):
        assert os.listdir(folder) == []


def test_a_process_that_is_ending_is_waited_for(tmp_path: Path) -> None:
    """Also if it removes the folder: the one that waited has the lock of the folder that is there then."""
    process = hold(tmp_path / "a")
    ending = threading.Timer(0.3, process.communicate)
    ending.start()
    with locked_folder(tmp_path / "a", "train.output", wait_seconds=30.0):
        ending.join()
        (tmp_path / "a" / "file").touch()
        with pytest.raises(InputError), locked_folder(tmp_path / "a", "train.output", wait_seconds=0.0):
            pass
    assert os.listdir(tmp_path / "a") == ["file"]


def test_other_folders_and_earlier_locks_of_this_process_are_no_obstacle(tmp_path: Path) -> None:
    for _ in range(2):
        with locked_folder(tmp_path / "a", "x", 0.0), locked_folder(tmp_path / "b", "x", 0.0):
            pass


def test_a_folder_that_stays_empty_is_removed_if_the_lock_created_it(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ZeroDivisionError), locked_folder(tmp_path / "mine" / "b" / "c", "x", 0.0):
        raise ZeroDivisionError
    assert os.listdir(tmp_path / "mine") == []
    with locked_folder(tmp_path / "mine", "x", 0.0):
        pass
    assert (tmp_path / "mine").is_dir()
    with locked_folder(tmp_path / "mine" / "b" / "c", "x", 0.0):
        (tmp_path / "mine" / "b" / "note").touch()
    assert os.listdir(tmp_path / "mine" / "b") == ["note"]


def test_a_folder_that_was_removed_and_created_again_is_another_one(tmp_path: Path) -> None:
    """A process may open the folder just before the one that holds its lock removes it."""
    folder = tmp_path / "a"
    folder.mkdir()
    handle = os.open(folder, os.O_RDONLY)
    try:
        assert is_open_at(handle, folder)
        folder.rmdir()
        assert not is_open_at(handle, folder)
        folder.mkdir()
        assert not is_open_at(handle, folder)
    finally:
        os.close(handle)
