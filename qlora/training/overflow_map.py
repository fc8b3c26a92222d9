"""Overflow map: which frozen matrices come near the end of float16 on a run's own first sequences.

They compute in float32. Measured in one forward whose products are all in float32: the largest value of each matrix's
input and output, against a quarter of 65,504. Massive activations keep their position and size from text to text
(arXiv:2402.17762), and training moves them little: a factor of 4 covers both. A second forward, as the run computes,
adds what is not finite.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapters.expert_targets import adaptable
from qlora.data.batching.collate import Batch, collate
from qlora.data.types import Example
from qlora.distributed.processes import Processes
from qlora.errors import BaseModelError
from qlora.model.float16_products import LARGEST, float32_products, multiply_in_float16
from qlora.training.base_trace import hooks
from qlora.training.loss import TokenLoss

LIMIT = LARGEST / 4
SEQUENCES = 4  # of the run, that are measured
SHOWN = 3  # matrices that a line names
ATTEMPTS = 3  # of the second forward


@dataclass(frozen=True)
class OverflowMap:
    """The frozen matrices that compute in float32, with the largest value seen there; the loss in both dtypes."""

    in_float32: Mapping[str, float] = field(default_factory=dict)  # path -> largest |input| or |output|
    matrices: int = 0
    float32_loss: float = 0.0  # mean over the trained tokens that were measured
    float16_loss: float = 0.0

    def __str__(self) -> str:
        losses = f"loss of the first sequences {self.float16_loss:.4f}, in float32 {self.float32_loss:.4f}"
        if not self.in_float32:
            return f"float16: no value of {self.matrices} matrices comes near {LARGEST:,.0f}; {losses}"
        largest = sorted(self.in_float32.items(), key=lambda item: -item[1])
        names = ", ".join(f"{path} {value:,.0f}" for path, value in largest[:SHOWN])
        more = "" if len(largest) <= SHOWN else ", ..."
        return (
            f"float16: {len(largest)} of {self.matrices} matrices compute in float32, since float16 ends at "
            f"{LARGEST:,.0f} (largest values: {names}{more}); {losses}"
        )


@torch.no_grad()
def choose_products(loss: TokenLoss, sequences: Sequence[Example], processes: Processes) -> OverflowMap:
    """Measure the first of `sequences` and set the dtype of every product of the model, which is in evaluation mode.

    BaseModelError if the loss is not finite: in float32, or in float16 with those matrices in float32.
    """
    loss.eval()
    first = [sequences[index] for index in range(min(SEQUENCES, len(sequences)))]
    batches = [collate([example], pad_id=0).to(processes.device) for example in first]
    with float32_products(loss.model):
        float32_loss, largest = _measure(loss, batches)
    _require_finite(float32_loss, "float32")
    chosen = _above(LIMIT, largest, processes)
    for _ in range(ATTEMPTS):
        multiply_in_float16(loss.model, chosen)
        float16_loss, rounded = _measure(loss, batches)
        overflows = _above(LARGEST, rounded, processes) - chosen
        if not overflows:
            break
        chosen |= {next(path for path in rounded if path in overflows)}  # what follows it may be finite then
    _require_finite(float16_loss, "float16")
    in_float32 = {path: value for path, value in largest.items() if path in chosen}
    return OverflowMap(in_float32, len(largest), float32_loss, float16_loss)


@torch.no_grad()
def first_overflow(loss: TokenLoss, batches: Sequence[Batch]) -> str | None:
    """The path of the first frozen matrix with a value that is not finite, in a forward of `batches`."""
    _, largest = _measure(loss, batches)
    return next((path for path, value in largest.items() if not math.isfinite(value)), None)


def _measure(loss: TokenLoss, batches: Sequence[Batch]) -> tuple[float, dict[str, float]]:
    """The mean loss; of each frozen matrix that ran, in the order of their calls, the largest |input| or |output|."""
    maxima: dict[str, Tensor] = {}
    # An adapted matrix is called through its adapter; the experts of a stack are one matrix.
    paths = {id(loss.model.get_submodule(path)): path for path in adaptable(loss.model)}

    def record(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        path = paths[id(module)]
        bounds = [bound.abs() for values in (arguments[0], output) for bound in torch.aminmax(values.float())]
        maxima[path] = torch.stack([*bounds, *([maxima[path]] if path in maxima else [])]).max()

    modules = [loss.model.get_submodule(path) for path in paths.values()]
    with hooks(modules, record):
        losses = torch.stack([loss.forward(*batch.arguments).sum() for batch in batches]).sum()
    tokens = max(1, sum(batch.trained_tokens for batch in batches))
    values = torch.stack([losses.float() / tokens, *maxima.values()]).tolist()  # the host waits once
    return values[0], dict(zip(maxima, values[1:], strict=True))


def _above(limit: float, largest: Mapping[str, float], processes: Processes) -> set[str]:
    """The paths whose largest value is above `limit`, or not a number, on any rank: GPUs may round differently."""
    flags = torch.tensor([not value <= limit for value in largest.values()], dtype=torch.long)
    return {path for path, flag in zip(largest, processes.sum_counts(flags).tolist(), strict=True) if flag}


def _require_finite(loss: float, dtype: str) -> None:
    if not math.isfinite(loss):
        other = "float32 or bfloat16" if dtype == "float16" else "another base"
        raise BaseModelError(f"model: the loss of the run's first sequences is {loss} in {dtype}. Use {other}.")
