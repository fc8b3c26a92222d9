"""Small models of several layers, their gradients, and a copy stream that copies as late as allowed."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from qlora.adapters.inject import inject
from qlora.adapters.lora import Lora
from qlora.memory.copy_stream import CopyStream
from qlora.model.attention import DOCUMENT_ATTENTION
from qlora.model.lean_modules import replace_with_lean
from qlora.model.linear_layers import linear_paths
from qlora.quant import Quant, build_quantizer
from qlora.training.loss import TokenLoss
from support.tiny_models import COMMON, FAMILIES, VOCABULARY

CPU = torch.device("cpu")
LAYERS = 5


class LateCopyStream(CopyStream):
    """Copies only when the compute stream waits: without a wait the target is NaN, a changed source spoils the copy."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.queued: list[Callable[[], Any]] = []
        self.completed = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.fill_(0xFF)  # a NaN in every float
        self.queued.append(lambda: target.copy_(source))

    def record(self) -> int:
        return self.completed + len(self.queued)

    def make_compute_wait(self, event: int) -> None:
        while self.completed < event:
            self.queued.pop(0)()
            self.completed += 1


def layered(family: str, layers: int = LAYERS, quantizer: Any = None, adapted: bool = True) -> Any:
    """A random frozen model of `layers` layers with random adapters, in training mode."""
    config = FAMILIES[family]().to_dict() | {"num_hidden_layers": layers}
    config.pop("layer_types", None)  # depends on the number of layers
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    model.set_attn_implementation(DOCUMENT_ATTENTION if model._supports_sdpa else "eager")
    model.requires_grad_(False)
    for path in linear_paths(model):
        parent, _, leaf = path.rpartition(".")
        linear = model.get_submodule(path)
        frozen = (quantizer or build_quantizer(Quant())).quantize(linear.weight.normal_(0, 0.15), linear.bias)
        setattr(model.get_submodule(parent), leaf, frozen)
    replace_with_lean(model)
    if adapted:
        adapt(model)
    return model.train()


@cache
def plain_gradients(family: str) -> Tensor:
    """Those of `layered(family)` with every layer and activation on the device, computed once."""
    return gradients(layered(family))


def adapt(model: Any) -> None:
    """Inject adapters with random values, A and B both non-zero."""
    inject(model, Lora(4, 8.0, dropout=0.1), "all-linear", seed=0)
    with torch.no_grad():
        for number, value in enumerate(trained(model)):
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(number)) * 0.05)


def gradients(model: Any, tokens: int = 24) -> Tensor:
    """All gradients of a micro-batch of two sequences as one vector; dropout is the same in every call."""
    parameters = trained(model)
    for parameter in parameters:
        parameter.grad = None
    torch.manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(2))
    TokenLoss(model)(ids, ids, torch.arange(tokens)[None]).backward()
    return torch.cat([parameter.grad.flatten() for parameter in parameters])  # type: ignore[union-attr]


def trained(model: Any) -> list[Tensor]:
    """The parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


assert COMMON["num_hidden_layers"] < LAYERS  # so that `layers` is not the family's own number
