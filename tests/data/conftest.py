"""Prepared data of tests is kept in a folder of its own, never in the user's."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that holds the entries of this test alone."""
    folder = tmp_path_factory.mktemp("kept")
    monkeypatch.setenv("QLORA_CACHE", str(folder))
    return folder / "data"
