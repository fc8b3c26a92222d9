"""Checks at start of a mixture of experts in bfloat16: rounding may change one token's experts, faults change all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.expert_families import save_family
from torch import Tensor, nn

from qlora.data.batching.join import join_documents
from qlora.data.types import Example
from qlora.errors import BaseModelError, DataError
from qlora.model import Model
from qlora.model.load_base import load
from qlora.quant import Quant, build_quantizer
from qlora.training.base_check import compare_base
from qlora.training.loss import TokenLoss
from qlora.training.packing_probe import refuse_leaks

CPU = torch.device("cpu")
MANY = {"num_experts": 16, "num_experts_per_tok": 4}


def base_of(folder: Path, family: str, seed: int, **changes: Any) -> Any:
    model = save_family(folder, family, seed=seed, **changes)
    return load(Model(name=str(model), dtype="bfloat16"), build_quantizer(Quant(block=32)), CPU).model


@pytest.mark.parametrize(("family", "seed", "changes"), [("qwen3_moe", 3, MANY), ("mixtral", 3, {})])
def test_a_token_that_visits_another_expert_is_no_fault(
    family: str, seed: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    agreement = compare_base(base_of(tmp_path / "base", family, seed, **changes))  # over all values they differ by 4 %
    assert agreement.largest_difference < 0.02 and agreement.notes == ()  # experts that no token visits are used, too


def test_experts_of_another_scale_are_refused(tmp_path: Path) -> None:
    model = base_of(tmp_path / "base", "qwen3_moe", 3, **MANY)
    forward = model.model.layers[1].mlp.experts.down_proj
    model.model.layers[1].mlp.experts.down_proj = Scaled(forward)
    with pytest.raises(BaseModelError, match="layer 2 of 2 differs"):
        compare_base(model)


class Scaled(nn.Module):
    """A stack of experts whose outputs are a third too large."""

    def __init__(self, stack: Any) -> None:
        super().__init__()
        self.base = stack

    def __len__(self) -> int:
        return len(self.base)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return 1.33 * self.base(x, expert)  # type: ignore[no-any-return]


class Leaking(nn.Module):
    """A norm whose output holds the mean of all earlier tokens, of other documents too."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1)[:, None]
        return self.norm(x + (x.float().cumsum(1) / count).to(x.dtype))  # type: ignore[no-any-return]


def test_a_leak_is_detected_and_rounding_is_not(tmp_path: Path) -> None:
    model = base_of(tmp_path / "base", "qwen3_moe", 3, **MANY)
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(40, 250, (30,), generator=draw).int().numpy() for _ in range(3)]
    packed = [join_documents([Example(str(n), values, values) for n, values in enumerate(ids)])]
    error = refuse_leaks(TokenLoss(model), packed, torch.bfloat16, CPU)
    assert error is not None and error < 0.1
    model.model.layers[0].input_layernorm = Leaking(model.model.layers[0].input_layernorm)
    with pytest.raises(DataError, match="attend to each other"):
        refuse_leaks(TokenLoss(model), packed, torch.bfloat16, CPU)
