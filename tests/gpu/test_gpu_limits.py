"""What a GPU or its driver refuses: pinned memory, bfloat16, memory itself. A run falls back, or names the remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support.gpu_runs import GpuRuns, checked_gpu
from support.pretended_gpu import pretended_gpu
from support.small_runs import differing_tensors, run
from support.training_hooks import before_first_forward

from qlora.errors import QloraError
from qlora.memory.activation_recompute import decoder_layers
from qlora.training.loss import TokenLoss


def test_a_driver_that_pins_no_memory_gets_a_message(runs: GpuRuns) -> None:
    recipe = runs.recipe("unpinned", "memory.offload_activations=true", "memory.recompute=none", "data.max_length=128")
    with pretended_gpu() as gpu, pytest.raises(QloraError, match=r"can't pin .* raise the limit on locked memory"):
        gpu.pinned.limit_bytes = 2**12
        run(recipe)


def test_a_gpu_without_bfloat16_trains_in_float32(runs: GpuRuns) -> None:
    turing = runs.train("model.dtype=auto", capability=(7, 5))
    assert "torch_attn::_varlen_attn" not in turing.counters.launches
    assert '"float32"' in (turing.folder / "run.json").read_text()


POLICIES = [
    pytest.param((), marks=pytest.mark.slow, id="resident"),
    pytest.param(("memory.offload_activations=true",), id="offload"),
]


@contextmanager
def memory_ends(call: int) -> Iterator[list[int]]:
    """Inside the block the GPU runs out of memory in one forward of the last layer; yields the calls so far."""
    calls: list[int] = []

    def fail(*_: object) -> None:
        calls.append(len(calls) + 1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. The rest.")

    def watch(model: TokenLoss) -> None:
        decoder_layers(model.model)[-1].register_forward_pre_hook(fail)

    with before_first_forward(watch):
        yield calls


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_that_runs_out_of_memory_repeats_its_step(runs: GpuRuns, policy: tuple[str, ...]) -> None:
    settings = ("train.max_steps=2", "data.max_length=128", *policy)
    plain = runs.train(*settings)
    recipe = runs.recipe(f"short-{len(policy)}", *settings)
    with memory_ends(3) as calls, checked_gpu():
        run(recipe)
    assert len(calls) > 3
    assert differing_tensors(plain.folder, recipe.train.output) == []
