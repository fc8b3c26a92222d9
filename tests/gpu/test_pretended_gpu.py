"""The pretended GPU itself: each kind of mistake is seen, at the line that makes it, and correct code is not blamed."""

from collections.abc import Callable

import pytest
import torch
from support.gpu_runs import GpuRuns
from support.pretended_gpu import GpuError, on_gpu, pretended_gpu
from torch import Tensor, nn

from qlora.memory.copy_stream import CopyStream, host_bytes
from qlora.model.linear_layers import frozen_linears
from qlora.quant.linear import frozen
from qlora.runs.memory_setup import load_base
from qlora.utils.devices import same_device
from qlora.utils.send import send

GPU = torch.device("cuda")


def host_tensor() -> Tensor:
    return host_bytes(16, GPU).view(torch.float32).fill_(1.0)


def read_too_early(stream: CopyStream) -> None:
    target = torch.zeros(4, device=GPU)
    stream.wait_for_compute()
    stream.copy(target, host_tensor())
    target + 1


def write_source_too_early(stream: CopyStream) -> None:
    source, target = torch.zeros(4, device=GPU), host_tensor()
    stream.wait_for_compute()
    stream.copy(target, source)
    source.add_(1)


def free_too_early(stream: CopyStream) -> None:
    source, target = torch.zeros(4, device=GPU), host_tensor()
    stream.wait_for_compute()
    stream.copy(target, source)
    event = stream.record()
    del source
    torch.zeros(4, device=GPU)  # may get the memory
    stream.make_compute_wait(event)


def copy_too_early(stream: CopyStream) -> None:
    stream.wait_for_compute()
    stream.copy(host_tensor(), torch.zeros(4, device=GPU))


def read_on_host_too_early(stream: CopyStream) -> None:
    source, target = torch.zeros(4, device=GPU), host_tensor()
    stream.wait_for_compute()
    stream.copy(target, source)
    stream.make_compute_wait(stream.record())
    target + 1


def mix_devices(stream: CopyStream) -> None:
    torch.zeros(4, device=GPU) + torch.zeros(4)


def mix_with_a_count_on_the_host(stream: CopyStream) -> None:
    values = [torch.zeros(4, device=GPU) for _ in range(4)]
    torch._fused_adamw_(
        *([value] for value in values), [], [torch.zeros(())], lr=0.1, beta1=0.9, beta2=0.9, weight_decay=0.0,
        eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip


MISTAKES: dict[Callable[[CopyStream], None], str] = {
    read_too_early: "used before the copy into it",
    write_source_too_early: "written before the copy of it",
    free_too_early: "source freed before its copy",
    copy_too_early: "may start before the computation",
    read_on_host_too_early: "host memory used before the host waited",
    mix_devices: "tensors on both devices",
    mix_with_a_count_on_the_host: "tensors on both devices",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_seen_at_its_line(mistake: Callable[[CopyStream], None]) -> None:
    with pretended_gpu() as gpu, pytest.raises(GpuError, match=MISTAKES[mistake]):
        mistake(CopyStream(GPU))
    (event,) = gpu.counters.violations
    assert event.line.startswith(("gpu/test_pretended_gpu.py:", "memory/copy_stream.py:"))


def test_copies_that_are_waited_for_are_complete() -> None:
    with pretended_gpu() as gpu:
        stream, target, back = CopyStream(GPU), torch.zeros(4, device=GPU), host_tensor().zero_()
        source = host_tensor()
        stream.wait_for_compute()
        stream.copy(target, source)
        stream.make_compute_wait(stream.record())
        target.mul_(3)
        stream.wait_for_compute()
        stream.copy(back, target)
        assert not gpu.counters.syncs
        stream.synchronize()
        assert back.tolist() == [3.0] * 4
    assert not gpu.counters.violations


def test_waits_of_the_host_are_counted() -> None:
    with pretended_gpu() as gpu:
        x = send(torch.arange(4.0), GPU)
        assert on_gpu(x) and x.device == torch.device("cuda", 0) and not gpu.counters.syncs
        waits: list[Callable[[], object]] = [
            lambda: float(x.sum()), lambda: bool((x > 1).any()), lambda: x.tolist(), lambda: x[x > 1], lambda: x.cpu(),
            lambda: torch.tensor([1], device=GPU), lambda: (x > 1).nonzero(), torch.cuda.synchronize,
        ]  # fmt: skip
        for number, wait in enumerate(waits, start=1):
            wait()
            assert sum(gpu.counters.syncs.values()) == number, gpu.counters.report()


def test_gradients_stay_on_the_gpu() -> None:
    with pretended_gpu() as gpu:
        layer = nn.Linear(4, 4, device=GPU)
        layer(torch.ones(2, 4, device=GPU)).to(torch.float64).sum().backward()
        assert on_gpu(layer.weight.grad) and on_gpu(layer.bias.grad)  # type: ignore[arg-type]
        host = torch.ones(4, requires_grad=True)
        host.to(GPU).sum().backward()
        assert not on_gpu(host.grad)  # type: ignore[arg-type]
    assert not gpu.counters.violations


def test_a_bias_on_the_host_is_seen(runs: GpuRuns) -> None:
    with pretended_gpu():
        base = load_base(runs.recipe("unused", "memory.weights=resident", family="qwen2"), GPU, None)
        ids = torch.ones(1, 4, dtype=torch.long, device=GPU)
        base.model(input_ids=ids)
        layer = next(layer for layer in frozen_linears(base.model).values() if layer.bias is not None)
        layer.bias = frozen(layer.bias.to("cpu"))  # type: ignore[union-attr]
        with pytest.raises(GpuError, match="tensors on both devices"):
            base.model(input_ids=ids)


@pytest.mark.parametrize(("first", "second", "same"), [
    ("cuda", "cuda:0", True), ("cuda:1", "cuda", True), ("cuda:0", "cuda:1", False), ("cpu", "cuda", False),
    ("cpu", "cpu", True), ("meta", "cpu", False),
])  # fmt: skip
def test_devices_are_the_same_without_an_index_too(first: str, second: str, same: bool) -> None:
    assert same_device(torch.device(first), torch.device(second)) is same
