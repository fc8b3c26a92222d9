"""Tests on the pretended GPU share their models and finished runs."""

import pytest
from support.gpu_runs import GpuRuns


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> GpuRuns:
    return GpuRuns(tmp_path_factory.mktemp("gpu"))
