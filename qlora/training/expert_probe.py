"""Probe of expert adapters before training: each expert computes the update that a reader of its file gives it.

The update of an expert is taken from PEFT's layout of the stack, by PEFT's own formula; a stack whose columns belong
to other experts would train well, and be wrong in every program that loads it.
"""

import torch
from torch import Tensor, nn

from qlora.adapters.expert_keys import stack_a, stack_b
from qlora.adapters.expert_lora import ExpertLora
from qlora.adapters.inject import adapted_experts
from qlora.errors import QloraError

ROWS = 4
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.2}  # of the difference, in standard deviations of the update


@torch.no_grad()
def refuse_wrong_columns(model: nn.Module) -> float | None:
    """The largest difference, in standard deviations of the update; None without adapters of experts.

    Of the first stack of each name. QloraError, with the expert, if it is more than rounding.
    """
    first: dict[str, tuple[str, ExpertLora]] = {}
    for path, layer in adapted_experts(model).items():
        first.setdefault(path.rpartition(".")[2], (path, layer))
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
    limit = LIMITS.get(dtype, LIMITS[torch.bfloat16])
    # In float16 only products are.
    dtype = torch.float32 if dtype == torch.float16 else dtype
    return max((_check_stack(path, layer, limit, dtype) for path, layer in first.values()), default=None)


def _check_stack(path: str, layer: ExpertLora, limit: float, dtype: torch.dtype) -> float:
    """The largest difference of one stack, with a random B in place of its own."""
    kept, training = layer.B.clone(), layer.training
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    try:
        layer.eval().B.copy_(torch.randn(layer.B.shape, generator=generator))
        updates = _updates_in_file(layer)
        for expert, (a, b) in enumerate(updates):
            x = torch.randn(ROWS, a.shape[1], generator=generator).to(a.device, dtype)
            expected = layer.scaling * (x.float() @ a.t() @ b.t())
            update = layer(x, expert).float() - layer.base(x, expert).float()
            difference = float((update - expected).abs().max() / expected.std().clamp_min(1e-12))
            if not difference <= limit:
                raise QloraError(
                    f"{path}: expert {expert} computes another update than its columns in the adapter's file hold "
                    f"(they differ by {difference:.2g} standard deviations). Please report the model."
                )
            largest = max(largest, difference)
    finally:
        layer.B.copy_(kept)
        layer.train(training)
    return largest


def _updates_in_file(layer: ExpertLora) -> list[tuple[Tensor, Tensor]]:
    """A [R, I] and B [O, R] of each expert, taken from the tensors of the file as PEFT does."""
    a, b = layer.pair()
    experts, file_a, file_b = len(layer), stack_a(a), stack_b(b)
    by_expert_a, by_expert_b = file_a.reshape(experts, -1, file_a.shape[1]), file_b.reshape(len(file_b), -1, experts)
    return [(by_expert_a[expert], by_expert_b[..., expert]) for expert in range(experts)]
