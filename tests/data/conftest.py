"""The cache of prepared data is a temporary folder in these tests, never the user's."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this test's cache entries."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("QLORA_CACHE", str(folder))
    return folder / "data"
