"""Expert stack: the same matrix of every expert of a layer, each stored by itself.

A stack is quantized one expert at a time, so that no quantization block lies in two experts, and a forward dequantizes
only the experts that its tokens visit.
"""

from collections.abc import Iterable

from torch import Tensor, nn

# Parameters of transformers' experts classes, in the order in which these register them; PEFT wraps them in this order.
STACKS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


class ExpertStack(nn.ModuleList):
    """The matrix [O, I] of each of E experts: `nn.Linear` on `meta` before loading, FrozenLinear after it.

    `transposed`: whether transformers' class holds the stack as [E, I, O] in place of [E, O, I].
    """

    def __init__(self, layers: Iterable[nn.Module], transposed: bool = False) -> None:
        super().__init__(layers)
        self.transposed = transposed

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Y [N, O] of x [N, I] by one expert."""
        return self[expert](x)  # type: ignore[no-any-return]
