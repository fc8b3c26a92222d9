"""Laws of every optimizer in the table: its state is saved and restored bit for bit, and it computes AdamW."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qlora.adapters import peft_files
from qlora.errors import QloraError
from qlora.training import OPTIMIZERS
from qlora.training.optimizers import load_state, parameter_groups, scale_learning_rates, state_tensors

SHAPES = {"up.A": (64, 64), "up.B": (96, 64), "q.A": (4, 64), "q.B": (63, 3)}  # 8 bits from 4,096 values on


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def step(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for value in named.values():
        value.grad = torch.randn(value.shape, generator=generator) * 0.1
    scale_learning_rates(optimizer, 1 / (1 + number))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def build(kind: str, named: dict[str, nn.Parameter], ratio: float | None = None) -> torch.optim.Optimizer:
    return OPTIMIZERS[kind].build(parameter_groups(named, 1e-2, ratio), (0.9, 0.99), 0.01)


def save_and_read(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    (folder / "optimizer.safetensors").write_bytes(peft_files.serialize(tensors))
    return peft_files.read_tensors(folder / "optimizer.safetensors")


@pytest.mark.parametrize("ratio", [None, 16.0])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_restored_state_continues_bit_for_bit(kind: str, ratio: float | None, tmp_path: Path) -> None:
    named = parameters()
    optimizer = build(kind, named, ratio)
    for number in range(5):
        step(optimizer, named, number)
    saved = save_and_read(state_tensors(optimizer, named), tmp_path)
    copies = {name: nn.Parameter(value.detach().clone()) for name, value in named.items()}
    resumed = build(kind, copies, ratio)
    load_state(resumed, copies, saved)
    restored = state_tensors(resumed, copies)
    assert saved.keys() == restored.keys()
    assert all(torch.equal(saved[key], restored[key]) and saved[key].dtype == restored[key].dtype for key in saved)
    for number in range(5, 10):
        step(optimizer, named, number)
        step(resumed, copies, number)
    assert all(torch.equal(named[name], copies[name]) for name in named)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_saved_state_is_a_copy(kind: str) -> None:
    named = parameters()
    optimizer = build(kind, named)
    step(optimizer, named, 0)
    saved = state_tensors(optimizer, named)
    before = {key: value.clone() for key, value in saved.items()}
    step(optimizer, named, 1)
    assert all(torch.equal(saved[key], before[key]) for key in saved)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_empty_state_before_the_first_step_is_restored(kind: str) -> None:
    named, copies = parameters(), parameters()
    optimizer, resumed = build(kind, named), build(kind, copies)
    load_state(resumed, copies, state_tensors(optimizer, named))
    step(optimizer, named, 0)
    step(resumed, copies, 0)
    assert all(torch.equal(named[name], copies[name]) for name in named)


@pytest.mark.parametrize("chunk_values", [64, 4096, 2**22])
def test_offloaded_adamw_is_adamw_bit_for_bit(chunk_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora.training.offloaded_adamw.CHUNK_VALUES", chunk_values)
    expected, actual = parameters(), parameters()
    optimizers = build("adamw", expected, 4.0), build("offloaded_adamw", actual, 4.0)
    for number in range(4):
        for optimizer, named in zip(optimizers, (expected, actual), strict=True):
            step(optimizer, named, number)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    buffers = optimizers[1]._buffers
    assert max(buffer.numel() for buffer in buffers) <= 2 * max(chunk_values, 64)  # both moments of a chunk
    states = [state_tensors(optimizer, named) for optimizer, named in zip(optimizers, (expected, actual), strict=True)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_state_of_another_optimizer_or_another_rank_is_refused() -> None:
    def state_of(kind: str) -> dict[str, Tensor]:
        named = parameters()
        optimizer = build(kind, named)
        step(optimizer, named, 0)
        return state_tensors(optimizer, named)

    for saved, kind in ((state_of("adamw"), "paged_adamw_8bit"), (state_of("adamw_8bit"), "paged_adamw_32bit")):
        with pytest.raises(QloraError, match="optimizer state"):
            load_state(build(kind, named := parameters()), named, saved)
    saved = state_of("paged_adamw_32bit")
    wide = {key: value.repeat(2, 2) if value.ndim == 2 else value for key, value in saved.items()}
    with pytest.raises(QloraError, match="optimizer state"):
        load_state(build("paged_adamw_32bit", named := parameters()), named, wide)
    with pytest.raises(QloraError, match="not a trainable parameter"):
        load_state(build("adamw", named := parameters()), named, {"removed.A/exp_avg": torch.zeros(3)})


def test_adamw_refuses_the_state_of_bitsandbytes() -> None:
    named = parameters()
    optimizer = build("paged_adamw_32bit", named)
    step(optimizer, named, 0)
    with pytest.raises(QloraError, match="optimizer state"):
        load_state(build("adamw", others := parameters()), others, state_tensors(optimizer, named))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_is_adamw(kind: str) -> None:
    named, expected = parameters(), parameters()
    optimizer = build(kind, named)
    reference = torch.optim.AdamW(expected.values(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.01)
    for number in range(4):
        step(optimizer, named, number)
        for group in reference.param_groups:
            group["peak"] = 1e-2
        step(reference, expected, number)
    start = parameters()
    for name in named:
        change = (expected[name] - start[name]).norm()
        # 8-bit moments: about 1 % of a step (arXiv:2110.02861); 32-bit ones: rounding in another order
        tolerance = 0.05 if "8bit" in kind and named[name].numel() >= 4096 else 1e-4
        assert (named[name] - expected[name]).norm() <= tolerance * change


def test_lora_plus_multiplies_the_learning_rate_of_b() -> None:
    named = parameters()
    others, b_matrices = parameter_groups(named, 1e-3, 16.0)
    assert [others["lr"], b_matrices["lr"]] == [1e-3, 16e-3]
    assert {id(p) for p in b_matrices["params"]} == {id(p) for name, p in named.items() if name.endswith(".B")}
    assert len(others["params"]) + len(b_matrices["params"]) == len(named)
