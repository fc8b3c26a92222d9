"""Initializations: where a model starts, how much quantization error is removed, and what PEFT reads afterwards."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapted_models import build_adapter, identity_of, load_base, load_plain, logits
from support.small_runs import recipe_of, run, write_records
from torch import nn

from qlora.adapters import peft_files
from qlora.adapters.attach import attach
from qlora.adapters.init import InitResult, initialize, principal_directions
from qlora.adapters.inject import adapted, inject
from qlora.adapters.switch import disable_adapters
from qlora.errors import AdapterError
from qlora.model.load_base import Base
from qlora.model.original_weights import iter_weights

Zoo = Callable[..., Path]
FAMILY = "llama-tied-bias"


def initialized_base(
    zoo: Zoo, kind: str, init: str, quantizer: str = "nf4", rank: int = 6
) -> tuple[Base, Any, InitResult | None]:
    base = load_base(zoo(FAMILY), quantizer)
    adapter = build_adapter(kind, rank, 9.0)
    inject(base.model, adapter, "all-linear", 0)
    result = initialize(base.model, init, partial(iter_weights, base.folder.path), 0)
    base.model.eval()
    return base, adapter, result


def original_weights(base: Base) -> dict[str, torch.Tensor]:
    return dict(iter_weights(base.folder.path, set(adapted(base.model))))


def perturb(model: nn.Module) -> None:
    """Simulates training: every trainable tensor changes."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(4, 60), columns=st.integers(4, 60), share=st.floats(0, 1), flat=st.booleans())
def test_principal_directions_hold_the_energy_of_an_exact_svd(
    rows: int, columns: int, share: float, flat: bool
) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    matrix = torch.randn(rows, columns, generator=generator)
    if not flat:
        matrix = matrix @ torch.diag(0.8 ** torch.arange(columns))
    rank = 1 + int(share * (min(rows, columns) - 1))
    right = principal_directions(matrix, rank, generator)
    torch.testing.assert_close(right.t() @ right, torch.eye(rank), rtol=0, atol=1e-5)
    best = torch.linalg.svdvals(matrix)[:rank].square().sum()
    assert (matrix @ right).square().sum() > 0.98 * best  # the directions of a flat spectrum are hardly different


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_gaussian_draws_a_by_its_rank_and_starts_at_the_base(zoo: Zoo, kind: str) -> None:
    base, _, result = initialized_base(zoo, kind, "gaussian", rank=16)
    values = torch.cat([layer.A.detach().flatten() for layer in adapted(base.model).values()])
    assert result is None and abs(float(values.std()) - 1 / 16) < 0.002 and values.abs().max() > 3 / 16
    after = logits(base.model)
    with disable_adapters(base.model):
        torch.testing.assert_close(after, logits(base.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_pissa_on_a_dense_base_starts_at_the_base(zoo: Zoo, kind: str) -> None:
    """The update holds the base's principal directions, and A0, B0 subtract them."""
    base, _, result = initialized_base(zoo, kind, "pissa", "dense")
    after = logits(base.model)
    with disable_adapters(base.model):
        torch.testing.assert_close(after, logits(base.model), rtol=0, atol=1e-4)
    assert result == InitResult(0.0, 0.0)
    for layer in adapted(base.model).values():
        weight = layer.base.weight(torch.float32)
        residual = torch.linalg.svdvals(weight)[6:].norm()
        assert (weight - layer.scaling * (layer.B @ layer.A).detach()).norm() < 1.01 * residual
        torch.testing.assert_close(layer.A.norm(dim=1), layer.B.norm(dim=0), rtol=1e-3, atol=1e-4)  # equal shares


@pytest.mark.sample(of=4, every=("kind", "init"))
@pytest.mark.parametrize("quantizer", ["nf4", "fp4"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_the_reported_error_is_that_of_the_merged_weights(zoo: Zoo, init: str, kind: str, quantizer: str) -> None:
    base, _, result = initialized_base(zoo, kind, init, quantizer)
    originals = original_weights(base)
    norm = torch.cat([weight.flatten() for weight in originals.values()]).norm()
    assert result is not None and result.error_after < 0.97 * result.error_before
    for reported, merged in ((result.error_before, False), (result.error_after, True)):
        errors = [
            originals[path] - (layer.merged_weight() if merged else layer.base.weight(torch.float32))
            for path, layer in adapted(base.model).items()
        ]
        assert float(torch.cat([error.flatten() for error in errors]).norm() / norm) == pytest.approx(
            reported, rel=1e-4
        )


def test_loftq_removes_what_the_best_update_of_its_rank_can(zoo: Zoo) -> None:
    base, _, result = initialized_base(zoo, "lora", "loftq")
    originals = original_weights(base)
    residual = sum(
        torch.linalg.svdvals(originals[path] - layer.base.weight(torch.float32))[6:].square().sum()
        for path, layer in adapted(base.model).items()
    )
    total = sum(weight.square().sum() for weight in originals.values())
    assert result is not None and result.error_after <= 1.005 * float((residual / total) ** 0.5)


CASES = [(kind, "pissa", quantizer) for kind in ("lora", "rslora", "dora") for quantizer in ("nf4", "dense")]


@pytest.mark.sample(of=4, every=("kind",))
@pytest.mark.parametrize(("kind", "init", "quantizer"), [*CASES, ("lora", "loftq", "nf4"), ("dora", "loftq", "nf4")])
def test_a_trained_adapter_is_read_alike_here_and_by_peft(
    zoo: Zoo, kind: str, init: str, quantizer: str, tmp_path: Path
) -> None:
    base, adapter, _ = initialized_base(zoo, kind, init, quantizer)
    perturb(base.model)
    expected = logits(base.model)
    peft_files.write(tmp_path, base.model, adapter, identity_of(base))
    fresh = load_base(zoo(FAMILY), quantizer)
    attach(fresh.model, peft_files.read(tmp_path), fresh.manifest.sha256)
    torch.testing.assert_close(logits(fresh.model.eval()), expected, rtol=0, atol=1e-5)
    plain = load_plain(zoo(FAMILY))
    for path, layer in adapted(base.model).items():
        fresh_layer, stored = adapted(fresh.model)[path], layer.base.state_dict()
        assert all(torch.equal(value, stored[name]) for name, value in fresh_layer.base.state_dict().items())
        torch.testing.assert_close(layer.merged_weight(), fresh_layer.merged_weight(), rtol=1e-4, atol=1e-5)
        plain.get_submodule(path).weight.data = layer.base.weight(torch.float32).clone()
    peft_model = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(logits(peft_model), expected, rtol=0, atol=1e-3 if kind == "dora" else 1e-4)


def test_too_high_a_rank_and_loftq_without_an_error_are_refused(zoo: Zoo) -> None:
    with pytest.raises(AdapterError, match=r"adapter\.rank: 500"):
        initialized_base(zoo, "lora", "pissa", rank=500)
    with pytest.raises(AdapterError, match="16-bit"):
        initialized_base(zoo, "lora", "loftq", "dense")


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_a_run_records_the_error_that_its_initialization_removed(zoo: Zoo, init: str, tmp_path: Path) -> None:
    data = write_records(tmp_path / "records.jsonl", 4)
    manifest = run(recipe_of(zoo(FAMILY), data, tmp_path / "run", f"adapter.init={init}", "train.max_steps=1"))
    assert manifest["adapter"]["init"] == init and manifest["adapter"]["rank"] == 4
    error = manifest["adapter"]["quantization_error"]
    assert 0 < error["error_after"] < error["error_before"] < 0.2
