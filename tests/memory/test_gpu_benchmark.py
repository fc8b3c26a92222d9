"""The benchmark that measures peaks on a GPU, run on a CPU with a tiny model."""

import sys
from dataclasses import replace

from support.paths import BENCHMARKS
from support.published_models import _llama, workload

from qlora.memory.planner.config_reader import shapes_of

sys.path.insert(0, str(BENCHMARKS))

import memory


def test_every_configuration_of_the_benchmark_runs() -> None:
    config = _llama(64, 32, 64, 4, 4, 2)
    work = workload(shapes_of(config, "tiny"), rank=2, device="cpu")
    model = memory.RandomModel(work, config, "cpu")
    configurations = list(memory.configurations(work))
    keys = {memory.key(memory.entry_of(configuration)) for configuration in configurations}
    assert len(keys) * len(memory.CONFIGS) >= 30
    for configuration in (configurations[1], configurations[2], configurations[-1]):
        model.step(replace(configuration, max_length=64))  # bfloat16 on a CPU: thousands of tokens take minutes
    trained = [value for value in model.model.parameters() if value.requires_grad]
    assert trained and all(value.isfinite().all() for value in trained)


def test_the_longest_context_is_the_largest_that_fits() -> None:
    assert memory.longest(lambda length: length <= 1000) == 896
    assert memory.longest(lambda length: False) == 0
