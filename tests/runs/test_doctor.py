"""`qlora doctor`: what works, a remedy for each problem, proofs that a device computes, a block for an issue."""

from typing import Any

import pytest
import torch
from support.command_line import qlora
from torch.utils._python_dispatch import TorchDispatchMode

from qlora.runs.device_proof import STEPS, prove, prove_round_trip, prove_training, train_block
from qlora.runs.doctor import SHOWN, computes, report_lines

GPU = {
    "type": "cuda", "name": "A GPU", "capability": "7.5", "bf16": False, "total_bytes": 8 * 2**30,
    "free_bytes": 2**30, "proofs": [{"name": "NF4", "works": False, "result": "every dequantized value is zero"}],
}  # fmt: skip


class Dequantization(TorchDispatchMode):
    """Inside the block dequantized matrices are multiplied by a number, as a broken kernel might."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **kwargs or {})
        return output * self.factor if func is torch.ops.qlora.dequantize_4bit.default else output


def test_the_block_for_an_issue_has_all_versions_and_devices() -> None:
    report = qlora("doctor", "--json").json
    result = qlora("doctor")
    assert result.code == 0 and result.out == ""
    block = result.err.split("```")[1]
    assert all(f"{name} {report[name]}" in block for name in ("qlora", *SHOWN))
    assert all(device["name"] in block for device in report["devices"]) and "GiB of host memory" in block
    proofs = [proof for device in report["devices"] for proof in device["proofs"]]
    assert [proof["name"] for proof in proofs] == ["NF4", "float32", "float16", "bfloat16"] and computes(report)
    assert all(f"works    {proof['name']} on cpu: {proof['result']}" in result.err for proof in proofs)


def test_each_problem_is_a_line_with_its_remedy() -> None:
    report = qlora("doctor", "--json").json
    report |= {"devices": [GPU], "problems": ["a: do this", "b: do that"], "four_bit": False}
    lines = report_lines(report)
    assert "problem  a: do this" in lines and "problem  b: do that" in lines
    assert any("no bfloat16" in line and "1.0 GiB of 8.0 GiB free" in line for line in lines)
    assert not computes(report) and not any(line.startswith("works    NF4") for line in lines)


@pytest.mark.parametrize(("factor", "expected"), [(0.0, "every dequantized value is zero"), (1.001, "differ from")])
def test_silent_zeros_and_wrong_values_are_found(factor: float, expected: str) -> None:
    with Dequantization(factor):
        proof = prove_round_trip(torch.device("cpu"))
    assert not proof.works and expected in proof.result


def test_a_device_that_raises_or_returns_nothing_fails_every_proof() -> None:
    proofs = prove(torch.device("meta"))
    assert len(proofs) == 4 and not any(proof.works for proof in proofs)
    assert all("does not run (" in proof.result for proof in proofs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_training_proof_needs_the_loss_of_the_reference(dtype: torch.dtype) -> None:
    losses = train_block(torch.device("cpu"), dtype)
    assert len(losses) == STEPS and losses == sorted(losses, reverse=True)
    assert prove_training(torch.device("cpu"), dtype).works
    with Dequantization(1.5):
        wrong = train_block(torch.device("cpu"), dtype)
    assert abs(wrong[0] - losses[0]) > 0.05 * losses[0]
