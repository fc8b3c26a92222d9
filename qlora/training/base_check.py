"""Start-up check: the loaded base computes what transformers' own class computes on the same weights.

Both run a few tokens. The loaded model has frozen layers, lean modules, our attention kernel and our head; it runs with
gradients, so that the kernels of training are compared. The reference is the class with eager attention
(model/class_reference.py). Its layers are compared one by one: each gets what the loaded model's layer before it gave,
so that a difference is one layer's own. Only outputs of layers are kept, on the host.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qlora.errors import BaseModelError, QloraError, first_line
from qlora.model.attention import DOCUMENT_ATTENTION
from qlora.model.class_reference import build_reference
from qlora.model.expert_forward import expert_stacks
from qlora.model.kernel_watch import watch_kernel
from qlora.training.base_trace import (
    COMMON,
    Trace,
    mark_unused,
    run_in_training_mode,
    trace_loaded,
    trace_reference,
)
from qlora.utils.out_of_memory import is_out_of_memory

# Root mean square of the difference, in terms of a layer's update or of the spread of the logits. A wrong scale, mask
# or cap changes these by several percent; another kernel in 16 bits by about one.
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.03}
Size = Callable[[torch.Tensor], float]
UNFORCED_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.2}  # of logits, where no layer is compared
EPSILON = {torch.float32: 1e-6, torch.bfloat16: 2**-7}  # rounding of a layer's output


def check_base(model: Any, log: Callable[[str], None]) -> None:
    """Log how closely the base agrees with its class. BaseModelError, naming what differs, if it does not."""
    agreement = compare_base(model)
    for note in agreement.notes:
        log(note)
    name, difference = type(model).__name__, agreement.largest_difference
    log(f"base model: equal to transformers' {name} (largest difference {difference:.1e})")


@dataclass(frozen=True)
class BaseAgreement:
    """A base that agrees with its class: the largest relative difference, of layers and logits."""

    largest_difference: float
    notes: tuple[str, ...] = ()  # another attention kernel, layers that text does not reach


def compare_base(model: Any) -> BaseAgreement:
    """Compare a base with its class. Where our attention kernel does not fit, another one is taken.

    Frozen layers that text does not reach are marked. BaseModelError if no kernel gives what the class computes.
    """
    first, name = model.config._attn_implementation, type(model).__name__
    problems: list[str] = []
    for kernel in [first, *(("sdpa", "eager") if first == DOCUMENT_ATTENTION else ())]:
        if kernel != model.config._attn_implementation and not _switch(model, kernel):
            continue
        result = _compare(model)
        if isinstance(result, str):
            problems.append(result)
            continue
        notes = [f"attention: {kernel} in place of the kernel for packed documents: {problems[0]}"] if problems else []
        unused = mark_unused(model, result.called)
        if unused:
            notes.append(f"not adapted, since a forward of text does not reach them: {', '.join(unused)}")
        return BaseAgreement(result.largest_difference, tuple(notes))
    raise BaseModelError(f"model: {name} can't be used here: {problems[-1]}. Choose another base.")


@dataclass(frozen=True)
class _Comparison:
    """A comparison without a problem."""

    largest_difference: float
    called: set[str]  # paths of the frozen layers that ran


def _switch(model: Any, kernel: str) -> bool:
    """Give a model another attention kernel; False if its class does not take it."""
    try:
        model.set_attn_implementation(kernel)
    except (ValueError, ImportError):
        return False
    return bool(model.config._attn_implementation == kernel)


def _compare(model: Any) -> _Comparison | str:
    """The comparison of the base under its present kernel, or what is wrong with it."""
    own_kernel = model.config._attn_implementation == DOCUMENT_ATTENTION
    step = "it does not run with frozen layers"
    try:
        with watch_kernel() as use:
            loaded = trace_loaded(model)
        problem = use.problem() if own_kernel else None
        if problem:
            return problem
        step = "transformers' own class fails on it"
        reference = trace_reference(build_reference(model), loaded)
        step = "it does not run in training mode"
        run_in_training_mode(model)
    except Exception as error:  # a class can raise anything when its modules are not its own
        if isinstance(error, QloraError) or is_out_of_memory(error):
            raise
        return f"{step} ({type(error).__name__}: {first_line(error)})"
    difference = _differences(model, loaded, reference)
    return difference if isinstance(difference, str) else _Comparison(difference, loaded.called)


def _differences(model: Any, loaded: Trace, reference: Trace) -> float | str:
    """The largest relative difference of layers and logits, or the first one above its limit."""
    dtype = model.get_input_embeddings().weight.dtype
    limit, largest, size = LIMITS[dtype], 0.0, _size_for(model)
    if len(loaded.layers) != len(reference.layers):
        return "its layers run another number of times than in transformers' class"
    for number, (own, other) in enumerate(zip(loaded.layers, reference.layers, strict=True)):
        before = loaded.layers[number - 1] if number else None
        difference = _layer_difference(own, other, before, EPSILON[dtype], size)
        if not difference <= limit:
            return f"layer {number + 1} of {len(loaded.layers)} differs from transformers' class by {difference:.1%}"
        largest = max(largest, difference)
    limit = limit if loaded.layers else UNFORCED_LIMITS[dtype]
    difference = _relative(loaded.logits, reference.logits, size)
    if not difference <= limit:
        return f"its logits differ from those of transformers' class by {difference:.1%}"
    if not abs(loaded.loss - reference.loss) <= limit * abs(reference.loss):
        return f"its loss is {loaded.loss:.4f}, that of transformers' class {reference.loss:.4f}"
    first, second = loaded.logits[:, :COMMON]
    if not _relative(first, second, size) <= limit:
        return "its attention is not causal: tokens see those that follow them"
    return max(largest, difference)


def _layer_difference(
    own: torch.Tensor | None, other: torch.Tensor | None, before: torch.Tensor | None, epsilon: float, size: Size
) -> float:
    """The size of own - other, relative to what the layer added and to rounding of its output."""
    if own is None or other is None:
        return 0.0
    own, other = own.float(), other.float()
    update = other - before.float() if before is not None and before.shape == other.shape else other
    reference = size(update) + epsilon / LIMITS[torch.bfloat16] * size(other)
    return size(own - other) / max(reference, 1e-30)


def _relative(own: torch.Tensor, other: torch.Tensor, size: Size) -> float:
    """The size of own - other over the spread of `other`; infinite for another shape."""
    if own.shape != other.shape:
        return math.inf
    return size(own - other) / max(float(other.std()), 1e-30)


def _size_for(model: Any) -> Size:
    """How differences are measured: over all values; with experts in 16 bits, over those of a typical token.

    Rounding can change which of two experts of nearly equal weight a token visits: that token then differs by much.
    """
    has_experts = bool(expert_stacks(model)) and model.get_input_embeddings().weight.dtype != torch.float32
    return _typical_rms if has_experts else _rms


def _rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def _typical_rms(values: torch.Tensor) -> float:
    """The median over tokens of the root mean square of [..., I]."""
    return float(values.square().mean(-1).median().sqrt())
