"""The benchmark that measures peaks on a card takes its steps here as well, at a size that a CPU holds."""

import sys

from support.paths import BENCHMARKS
from support.published_models import _llama

from qlora.memory.planner.config_reader import shapes_of
from qlora.memory.planner.workload import AdapterSizes, Workload

sys.path.insert(0, str(BENCHMARKS))

import memory


def test_every_configuration_of_the_benchmark_runs() -> None:
    config = _llama(64, 32, 64, 4, 4, 2)
    shapes = shapes_of(config, "tiny")
    work = Workload(shapes, AdapterSizes(shapes.matrices, rank=2), device="cpu")
    rig = memory.Rig(work, config, "cpu")
    wanted = list(memory.configurations(work))
    assert len({memory.key(memory.row_of(each)) for each in wanted}) * len(memory.CONFIGS) >= 30
    for each in (wanted[1], wanted[2], wanted[-1]):
        rig.step(each)
    trained = [value for value in rig.model.parameters() if value.requires_grad]
    assert trained and all(value.isfinite().all() for value in trained)


def test_the_longest_context_is_the_last_that_fits() -> None:
    assert memory.longest(lambda length: length <= 1000) == 896
    assert memory.longest(lambda length: False) == 0
