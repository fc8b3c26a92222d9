"""Load of experts: the share of tokens that visits each expert of a layer, on the same sequences before and after.

The router is frozen, but adapters before it change what it reads. Sequences are those of the training data, up to
PROBE_TOKENS tokens; padding is not counted.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora.data.batching.collate import collate
from qlora.data.types import Example
from qlora.model.expert_forward import expert_stacks
from qlora.training.loss import TokenLoss

PROBE_TOKENS = 8192
DIGITS = 5  # of a share in run.json
Loads = Mapping[str, Sequence[float]]  # path of an experts' module -> share of tokens by expert; the sum is 1


@dataclass
class ExpertLoads:
    """The loads of a run; empty without experts."""

    tokens: int = 0  # of the sequences
    before: Loads = field(default_factory=dict)
    after: Loads = field(default_factory=dict)

    def __str__(self) -> str:
        experts, unvisited = (sum(map(count, self.before.values())) for count in (len, unvisited_experts))
        if not unvisited:
            return f"experts: each of {experts:,} is visited by some of the first {self.tokens:,} tokens"
        return f"experts: {unvisited:,} of {experts:,} are visited by none of the first {self.tokens:,} tokens"

    def measure_again(self, model: nn.Module, sequences: Sequence[Example], device: torch.device) -> None:
        """Measure the loads after training; all ranks of a sharded model take part."""
        if self.before:
            _, self.after = measure_loads(model, sequences, device)

    def as_json(self) -> dict[str, Any]:
        """The section of run.json."""
        return {"tokens": self.tokens, "before": _rounded(self.before), "after": _rounded(self.after)}


def unvisited_experts(shares: Sequence[float]) -> int:
    """How many experts of a layer no token visited."""
    return sum(share == 0 for share in shares)


def measure_loads(model: nn.Module, sequences: Sequence[Example], device: torch.device) -> tuple[int, Loads]:
    """The number of tokens, and the load of every expert, for the first sequences; nothing without experts."""
    if not expert_stacks(model):
        return 0, {}
    loss, visits, tokens = TokenLoss(model), dict[str, Tensor](), 0
    training = model.training
    loss.eval()
    with torch.no_grad(), _counted(model, visits):
        for sequence in sequences:
            if tokens >= PROBE_TOKENS:
                break
            batch = collate([sequence], pad_id=0).to(device)
            loss.head.hidden_states(batch.input_ids, batch.position_ids, batch.layout)
            tokens += len(sequence)
    model.train(training)
    return tokens, {path: (counts / counts.sum()).tolist() for path, counts in visits.items()}


@contextmanager
def _counted(model: nn.Module, visits: dict[str, Tensor]) -> Iterator[None]:
    """Inside the block the visits to the experts of each layer are counted."""
    stacks = {path.rpartition(".")[0]: len(stack) for path, stack in expert_stacks(model).items()}

    def counter(path: str, experts: int) -> Callable[..., None]:
        def count(_: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            index = next(value for value in tensors if not value.is_floating_point())
            counts = torch.bincount(index.reshape(-1), minlength=experts)
            visits[path] = visits[path] + counts if path in visits else counts

        return count

    handles = [
        model.get_submodule(path).register_forward_pre_hook(counter(path, experts), with_kwargs=True)
        for path, experts in stacks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounded(loads: Loads) -> dict[str, list[float]]:
    return {path: [round(share, DIGITS) for share in shares] for path, shares in loads.items()}
