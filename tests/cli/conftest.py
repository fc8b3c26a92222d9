"""Fixtures for the tests of the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.finished_run import FinishedRun


@pytest.fixture(scope="session")
def finished(zoo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A finished run; do not write into its folder."""
    return FinishedRun(zoo("llama-tied-bias"), tmp_path_factory.mktemp("finished"))
