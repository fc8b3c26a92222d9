"""The cache of prepared data is a temporary folder in these tests, never the user's."""

import itertools
from pathlib import Path

import pytest

_folders = itertools.count()


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this test's cache entries, which begins to exist with the first one."""
    folder = tmp_path_factory.getbasetemp() / "caches" / str(next(_folders))
    monkeypatch.setenv("QLORA_CACHE", str(folder))
    return folder / "data"
