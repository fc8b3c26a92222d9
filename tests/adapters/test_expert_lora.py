"""LoRA on stacks of experts: the update of each expert and its gradients."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapted_models import freeze
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qlora.adapters.expert_lora import ExpertLora
from qlora.quant.expert_stack import ExpertStack

Zoo = Callable[[str], Path]
EXPERTS, INPUTS, OUTPUTS, RANK = 5, 12, 7, 3
CLOSE = {"rtol": 0, "atol": 1e-5}


def build_stack(rank: int = RANK, bias: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> ExpertLora:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(EXPERTS, OUTPUTS, INPUTS, generator=generator).to(dtype)
    biases = torch.randn(EXPERTS, OUTPUTS, generator=generator).to(dtype)
    frozen = [freeze(weight, biases[e] if bias else None) for e, weight in enumerate(weights)]
    layer = ExpertLora(ExpertStack(frozen), rank, options.get("scaling", 0.5), options.get("dropout", 0.0))
    layer.reset(generator)
    nn.init.normal_(layer.B, generator=generator)
    return layer


def visit(layer: Any, x: Tensor, visits: list[int]) -> Tensor:
    """Rows of x by the experts of `visits`, as a layer calls its stack: each expert once, in order."""
    order = sorted(range(len(x)), key=lambda row: visits[row])
    outputs = [
        layer(x[[row for row in order if visits[row] == e]], e) for e in range(EXPERTS) if e in visits
    ]  # fmt: skip
    return torch.cat(outputs)[torch.tensor(order).argsort()]


def expected(layer: ExpertLora, x: Tensor, visits: list[int]) -> Tensor:
    """The same by indexing A and B for each row."""
    rows = []
    for row, e in zip(x, visits, strict=True):
        frozen = layer.base[e]
        weight = frozen.weight(torch.float32) + layer.scaling * layer.B[e] @ layer.A[e]
        rows.append(F.linear(row, weight, frozen.bias))
    return torch.stack(rows)


VISITS = [3, 0, 3, 1, 0, 3, 3, 1]  # not 2 and 4
X = torch.randn(len(VISITS), INPUTS, generator=torch.Generator().manual_seed(1))


# ---- output and gradients


@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_are_those_of_each_experts_update(bias: bool) -> None:
    layer, reference = build_stack(bias=bias), build_stack(bias=bias)
    x, other_x = X.clone().requires_grad_(), X.clone().requires_grad_()
    output, other = visit(layer, x, VISITS), expected(reference, other_x, VISITS)
    torch.testing.assert_close(output, other, **CLOSE)
    output.square().sum().backward()
    other.square().sum().backward()
    for own, theirs in ((x, other_x), (layer.A, reference.A), (layer.B, reference.B)):
        torch.testing.assert_close(own.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    assert not layer.A.grad[[2, 4]].any() and not layer.B.grad[[2, 4]].any()
    assert layer.A.grad[[0, 1, 3]].flatten(1).any(1).all()


def nodes(output: Tensor) -> set[Any]:
    """All nodes of a graph."""
    pending, known = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in known:
            known.add(node)
            pending += [parent for parent, _ in node.next_functions]
    return known


def test_a_side_receives_one_gradient_however_many_experts_are_visited() -> None:
    layer = build_stack()
    output = visit(layer, X, VISITS)
    into_sides = [
        node.name() for node in nodes(output) for parent, _ in node.next_functions
        if getattr(parent, "variable", None) is layer.A
    ]  # fmt: skip
    assert into_sides == ["UnbindBackward0"]


def gradients(layer: ExpertLora, run: Callable[[ExpertLora], Tensor], steps: int = 1) -> list[Tensor]:
    optimizer = torch.optim.SGD(layer.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        run(layer).square().sum().backward()
        optimizer.step()
    return [layer.A.grad, layer.B.grad]


def with_evaluation(layer: ExpertLora) -> Tensor:
    with torch.no_grad():
        visit(layer, X, VISITS)
    output = visit(layer, X, VISITS)
    with torch.no_grad():
        assert not visit(layer, X, VISITS).requires_grad
    return output


@pytest.mark.parametrize(
    "run",
    {
        "recomputed": lambda layer: checkpoint(visit, layer, X, VISITS, use_reentrant=False),
        "recomputed, with an input that needs a gradient": lambda layer: checkpoint(
            visit, layer, X.clone().requires_grad_(), VISITS, use_reentrant=False
        ),
        "evaluated in between": with_evaluation,
        "twice in a graph": lambda layer: torch.cat([visit(layer, X[:4], VISITS[:4]), visit(layer, X[4:], VISITS[4:])]),
    }.items(),
    ids=lambda item: item[0],
)
def test_gradients_are_the_same(run: tuple[str, Callable[[ExpertLora], Tensor]]) -> None:
    own, reference = build_stack(), build_stack()
    for own_side, side in zip(
        gradients(own, run[1], steps=3), gradients(reference, lambda r: expected(r, X, VISITS), steps=3), strict=True
    ):
        torch.testing.assert_close(own_side, side, rtol=1e-4, atol=1e-4)


def test_micro_batches_add_up() -> None:
    whole, split = build_stack(), build_stack()
    visit(whole, X, VISITS).square().sum().backward()
    for part in (slice(0, 3), slice(3, 8)):
        visit(split, X[part], VISITS[part]).square().sum().backward()
    torch.testing.assert_close(whole.A.grad, split.A.grad, **CLOSE)
    torch.testing.assert_close(whole.B.grad, split.B.grad, **CLOSE)


def test_views_follow_the_parameters() -> None:
    layer = build_stack()
    visit(layer, X, VISITS)
    duplicate = copy.deepcopy(layer)
    with torch.no_grad():
        layer.A.mul_(2.0)
    torch.testing.assert_close(visit(layer, X, VISITS), expected(layer, X, VISITS), **CLOSE)
    torch.testing.assert_close(visit(duplicate, X, VISITS), expected(duplicate, X, VISITS), **CLOSE)
    layer.A = nn.Parameter(layer.A.detach() + 1)
    torch.testing.assert_close(visit(layer, X, VISITS), expected(layer, X, VISITS), **CLOSE)
    double = layer.to(torch.float64)  # the frozen matrices keep their type
    assert double._views is None
    visit(double, X, VISITS).sum().backward()
    assert double.A.grad is not None and double.A.grad.dtype == torch.float64


def test_sides_are_float32_in_a_base_of_16_bits() -> None:
    layer = build_stack(dtype=torch.bfloat16)
    output = visit(layer, X.bfloat16(), VISITS)
    output.float().square().sum().backward()
    assert output.dtype == torch.bfloat16 and layer.A.dtype == layer.A.grad.dtype == torch.float32
    close = build_stack()
    visit(close, X, VISITS).square().sum().backward()
    assert (layer.B.grad - close.B.grad).norm() < 0.05 * close.B.grad.norm()


def test_dropout_is_on_the_input_of_the_update_only() -> None:
    layer = build_stack(dropout=0.5)
    x = X[:1].expand(4000, -1)
    with torch.no_grad():
        frozen, exact = layer.base(x, 2), layer.eval()(x, 2)
        dropped = layer.train()(x, 2)
    assert not torch.equal(dropped[0], dropped[1])
    mean = (dropped - frozen).mean(0)
    assert (mean - (exact - frozen)[0]).norm() < 0.1 * (exact - frozen)[0].norm()
