"""The choice between a fused kernel and its reference in torch: the kernel runs where it is right and faster.

Both are compared, forward and backward, and timed once for each kernel, device, dtype and width, on random rows of the
size of a micro-batch. Why a kernel does not run is noted once.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from qlora.errors import first_line
from qlora.utils.kernel_notes import note_kernel

PROBE_BYTES, PROBE_ROWS = 32 * 2**20, 2048  # of each random tensor, at most
RUNS = 5  # that are timed, after as many to warm up
# Of a value and of the root mean square of all: one rounding of 16 bits, a few of float32 (exp and rsqrt of a GPU).
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 4e-6}

Forward = Callable[..., Tensor | tuple[Tensor, ...]]  # differentiable, of the probe's inputs


def is_better(name: str, fused: Forward, reference: Forward, inputs: Sequence[Tensor]) -> bool:
    """Whether `fused` gives the values and gradients of `reference` at these inputs, in less time."""
    if find_spec("triton") is None:
        note_kernel(f"{name}: torch's own operators run, since Triton is not installed")
        return False
    reason = ""
    try:
        if not _agree(_run(fused, inputs), _run(reference, inputs)):
            reason = "gives other numbers here"
        elif _seconds(fused, inputs) >= _seconds(reference, inputs):
            reason = "is not faster here"
    except Exception as error:  # Triton compiles at its first call, which takes a C compiler
        reason = f"does not run here ({first_line(error)})"
    if reason:
        note_kernel(f"{name}: torch's own operators run, since the fused kernel {reason}")
    return not reason


def probe_rows(width: int, dtype: torch.dtype) -> int:
    """Rows of `width` values that a probe computes."""
    return max(1, min(PROBE_ROWS, PROBE_BYTES // (width * dtype.itemsize)))


def random_inputs(shapes: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Normally distributed tensors, drawn on the device."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(*shape, device=device, dtype=dtype, generator=generator) for shape in shapes]


@torch.enable_grad()
def _run(forward: Forward, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs, and the gradients of the inputs for outputs as their own gradients.

    Hooks of its own: a probe inside a recomputed layer must not count among the tensors that the layer saves.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        outputs = forward(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    directions = [output.detach().clone() for output in outputs]
    return (*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, directions))


def _agree(values: Sequence[Tensor], references: Sequence[Tensor]) -> bool:
    return all(agrees(value, reference) for value, reference in zip(values, references, strict=True))


def agrees(value: Tensor, reference: Tensor) -> bool:
    """Whether a value is the reference's within one rounding."""
    exact = reference.float()
    allowed = TOLERANCE[reference.dtype] * (exact.abs() + exact.square().mean().sqrt())
    return bool(((value.float() - exact).abs() <= allowed).all())


def _seconds(forward: Forward, inputs: Sequence[Tensor]) -> float:
    """GPU time of RUNS forward and backward passes."""
    for _ in range(RUNS):
        _run(forward, inputs)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(RUNS):
        _run(forward, inputs)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
