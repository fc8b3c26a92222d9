"""Tests on the pretended GPU share their models and finished runs."""

import pytest
from support.gpu_runs import GpuRuns


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> GpuRuns:
    return GpuRuns(tmp_path_factory.mktemp("gpu"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker runs them, so that every run is trained once."""
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.xdist_group("gpu"))
