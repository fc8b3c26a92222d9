"""Small models of several layers, their gradients, and a lane that is as late as a lane may be."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from qlora.adapters.inject import inject
from qlora.adapters.lora import Lora
from qlora.memory.copy_stream import CopyStream
from qlora.model.attention import NAME
from qlora.model.lean_modules import lean
from qlora.model.meta_model import linear_paths
from qlora.quant.nf4 import Nf4
from qlora.training.loss import TokenLoss
from support.tiny_models import COMMON, FAMILIES, VOCABULARY

CPU = torch.device("cpu")
LAYERS = 5


class LateCopyStream(CopyStream):
    """Makes no copy before somebody waits for it: who does not wait reads rubbish, who changes a source spoils it."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.queued: list[Callable[[], Any]] = []
        self.made = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.fill_(0xFF)  # a NaN in every float
        self.queued.append(lambda: target.copy_(source))

    def mark(self) -> int:
        return self.made + len(self.queued)

    def wait(self, mark: int) -> None:
        while self.made < mark:
            self.queued.pop(0)()
            self.made += 1


def layered(family: str, layers: int = LAYERS, quantizer: Any = None, adapted: bool = True) -> Any:
    """A random frozen model of `layers` layers with adapters away from their start, in training mode."""
    written = FAMILIES[family]().to_dict() | {"num_hidden_layers": layers}
    written.pop("layer_types", None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**written), dtype=torch.float32)
    model.set_attn_implementation(NAME if model._supports_sdpa else "eager")
    model.requires_grad_(False)
    for path in linear_paths(model):
        parent, _, leaf = path.rpartition(".")
        linear = model.get_submodule(path)
        frozen = (quantizer or Nf4()).quantize(linear.weight.normal_(0, 0.15), linear.bias)
        setattr(model.get_submodule(parent), leaf, frozen)
    lean(model)
    if adapted:
        adapt(model)
    return model.train()


def adapt(model: Any) -> None:
    """Adapters away from their start."""
    inject(model, Lora(4, 8.0, dropout=0.1), "all-linear", seed=0)
    with torch.no_grad():
        for number, value in enumerate(each for each in model.parameters() if each.requires_grad):
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(number)) * 0.05)


def gradients(model: Any, tokens: int = 24) -> Tensor:
    """All gradients of a micro-batch of two rows as one vector; dropout is the same in every call."""
    trainable = [each for each in model.parameters() if each.requires_grad]
    for each in trainable:
        each.grad = None
    torch.manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(2))
    TokenLoss(model)(ids, ids, torch.arange(tokens)[None]).backward()
    return torch.cat([each.grad.flatten() for each in trainable])  # type: ignore[union-attr]


assert COMMON["num_hidden_layers"] < LAYERS  # what transformers derives from the number of layers is derived anew
