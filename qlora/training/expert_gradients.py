"""Gradient check of expert adapters: every expert learns from the tokens that visit it, and from no others.

In the first steps, an expert that tokens with a gradient have visited must have a gradient for its B, and for its A
once its B is not zero; an expert that they have not visited must have none.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapters.expert_lora import ExpertLora
from qlora.adapters.inject import adapted_experts
from qlora.errors import QloraError
from qlora.training.gradient_check import STEPS

MIN_VISITS = 4  # tokens; where only one or two visit an expert, its activation may be zero for them
Log = Callable[[str], None]


def watch_experts(optimizer: torch.optim.Optimizer, model: nn.Module, sees_all: bool, log: Log) -> None:
    """Check the experts' gradients in the first STEPS optimizer steps; nothing without adapters of experts.

    sees_all: whether this process sees all tokens of a step. The step raises QloraError, which names the experts.
    """
    if adapted_experts(model):
        _ExpertWatch(optimizer, model, sees_all, log)


class _ExpertWatch:
    """Tokens with a gradient, counted by the expert that they visit, against the gradients of A and B."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, sees_all: bool, log: Log) -> None:
        self._stacks, self._sees_all, self._log, self._steps = adapted_experts(model), sees_all, log, 0
        self._visits: dict[str, Tensor] = {}  # path of the experts' module -> tokens of this step, by expert
        self._totals: dict[str, Tensor] = {}  # of all steps
        self._expected: dict[str, Tensor] = {}  # parameter -> experts that should have had a gradient
        self._received: dict[str, Tensor] = {}  # parameter -> experts that had one
        self._has_b: dict[str, Tensor] = {}  # path of a stack -> experts whose B is not zero before this step
        # After the step, and never removed: the check of all parameters removes its own hook before it.
        optimizer.register_step_post_hook(lambda *_: self._check())
        self._handles: list[Any] = []
        layers = {_module_of(path): layer for path, layer in self._stacks.items()}
        for path, layer in layers.items():
            hook = self._observer(path, layer)
            self._handles.append(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))

    def _observer(self, path: str, layer: ExpertLora) -> Callable[..., None]:
        def observe(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
                index = next(value for value in tensors if not value.is_floating_point())
                output.register_hook(lambda grad: self._count(path, layer, index, grad))

        return observe

    def _count(self, path: str, layer: ExpertLora, index: Tensor, grad: Tensor) -> None:
        """Add the tokens whose gradient [N, H] is not zero to the experts [N, K] that they visit."""
        if layer.B.grad is None or path not in self._visits:  # the first micro-batch of a step
            self._visits[path] = torch.zeros(len(layer), dtype=torch.long, device=grad.device)
            stacks = {name: stack for name, stack in self._stacks.items() if _module_of(name) == path}
            self._has_b |= {name: stack.B.detach().flatten(1).ne(0).any(1) for name, stack in stacks.items()}
        has_gradient = grad.reshape(-1, grad.shape[-1]).ne(0).any(1)
        visited = index.reshape(len(has_gradient), -1)[has_gradient]
        self._visits[path] += torch.bincount(visited.reshape(-1), minlength=len(layer))

    @torch.no_grad()
    def _check(self) -> None:
        """After an optimizer step, while its gradients are there."""
        self._steps += 1
        if self._steps > STEPS:
            return
        for path, layer in self._stacks.items():
            none = torch.zeros(len(layer), dtype=torch.long, device=layer.B.device)
            visits = self._visits.get(_module_of(path), none)
            self._compare(f"{path}.A", layer.A, visits, (visits > 0) & self._has_b.get(path, visits > 0))
            self._compare(f"{path}.B", layer.B, visits, visits > 0)
        for path, visits in self._visits.items():
            self._totals[path] = self._totals.get(path, torch.zeros_like(visits)) + visits
        self._visits.clear()
        if self._steps == STEPS:
            self._finish()

    def _compare(self, name: str, side: nn.Parameter, visits: Tensor, expected: Tensor) -> None:
        missing = torch.zeros_like(expected)
        received = missing if side.grad is None else side.grad.flatten(1).ne(0).any(1)
        strangers = received & (visits == 0)
        if self._sees_all and bool(strangers.any()):
            raise QloraError(
                f"{name} has a gradient for experts {_numbers(strangers)}, which no token with a gradient visits: "
                "updates belong to other experts than those whose tokens train them. Please report the model."
            )
        self._expected[name] = self._expected.get(name, missing) | expected
        self._received[name] = self._received.get(name, missing) | received

    def _finish(self) -> None:
        """After the last step of the check: all hooks are removed, and the result is reported."""
        for handle in self._handles:
            handle.remove()
        for name, expected in self._expected.items():
            often = self._totals.get(_module_of(_module_of(name)), torch.zeros_like(expected)) >= MIN_VISITS
            frozen = expected & often & ~self._received[name]
            if bool(frozen.any()):
                raise QloraError(
                    f"no gradient reaches {name} of experts {_numbers(frozen)} in {self._steps} steps, although tokens "
                    "visit them. They would never be trained; none of these steps was saved. Please report the model."
                )
        total, visited = (sum(map(count, self._totals.values())) for count in (len, _visited))
        self._log(
            f"experts: every one of {visited:,} that trained tokens visited in {self._steps} steps has gradients; "
            f"{total - visited:,} of {total:,} were not visited"
        )


def _module_of(path: str) -> str:
    return path.rpartition(".")[0]


def _visited(visits: Tensor) -> int:
    return int(visits.count_nonzero())


def _numbers(experts: Tensor) -> str:
    """`3, 7, 12 ...` of a mask."""
    numbers = experts.nonzero().flatten().tolist()
    return ", ".join(map(str, numbers[:5])) + " ..." * (len(numbers) > 5)
