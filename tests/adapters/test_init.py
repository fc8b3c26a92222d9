"""Laws of the starts: where a model starts, what is removed of the quantisation error, and who can read the result."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_runs import recipe_of, run, write_rows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora.adapters import ADAPTERS, peft_files
from qlora.adapters.init import InitResult, begin, principal
from qlora.adapters.inject import adapted, inject
from qlora.adapters.switch import adapters_off
from qlora.errors import AdapterError
from qlora.model import Model
from qlora.model.load_base import Base, load
from qlora.model.original_weights import matrices
from qlora.quant import QUANTIZERS

Zoo = Callable[..., Path]
FAMILY = "llama-tied-bias"
IDS = torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(0))
STARTS = ("pissa", "loftq")


def begun(zoo: Zoo, kind: str, init: str, quantizer: str = "nf4", rank: int = 6) -> tuple[Base, Any, InitResult | None]:
    base = load(Model(name=str(zoo(FAMILY)), dtype="float32"), QUANTIZERS[quantizer](), torch.device("cpu"))
    adapter = ADAPTERS[kind](rank=rank, alpha=9.0)
    inject(base.model, adapter, "all-linear", 0)
    found = begin(base.model, init, partial(matrices, base.folder.path), 0)
    base.model.eval()
    return base, adapter, found


def move(model: nn.Module) -> None:
    """Training, as far as an adapter's form goes: every tensor somewhere else."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(4, 60), columns=st.integers(4, 60), share=st.floats(0, 1), flat=st.booleans())
def test_principal_directions_hold_the_energy_that_an_exact_svd_finds(
    rows: int, columns: int, share: float, flat: bool
) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    matrix = torch.randn(rows, columns, generator=generator)
    if not flat:
        matrix = matrix @ torch.diag(0.8 ** torch.arange(columns))
    rank = 1 + int(share * (min(rows, columns) - 1))
    right = principal(matrix, rank, generator)
    torch.testing.assert_close(right.t() @ right, torch.eye(rank), rtol=0, atol=1e-5)
    best = torch.linalg.svdvals(matrix)[:rank].square().sum()
    assert (matrix @ right).square().sum() > 0.98 * best  # a flat spectrum has no directions to tell apart


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_gaussian_draws_a_by_its_rank_and_starts_at_the_base(zoo: Zoo, kind: str) -> None:
    base, _, found = begun(zoo, kind, "gaussian", rank=16)
    values = torch.cat([layer.A.detach().flatten() for layer in adapted(base.model).values()])
    assert found is None and abs(float(values.std()) - 1 / 16) < 0.002 and values.abs().max() > 3 / 16
    after = logits(base.model)
    with adapters_off(base.model):
        torch.testing.assert_close(after, logits(base.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_pissa_on_a_dense_base_starts_at_the_base_and_trains_its_principal_part(zoo: Zoo, kind: str) -> None:
    base, _, found = begun(zoo, kind, "pissa", "dense")
    after = logits(base.model)
    with adapters_off(base.model):
        torch.testing.assert_close(after, logits(base.model), rtol=0, atol=1e-4)  # what is added is taken away again
    assert found == InitResult(0.0, 0.0)
    for layer in adapted(base.model).values():
        weight = layer.base.weight(torch.float32)
        left = torch.linalg.svdvals(weight)[6:].norm()
        assert (weight - layer.scaling * (layer.B @ layer.A).detach()).norm() < 1.01 * left
        torch.testing.assert_close(layer.A.norm(dim=1), layer.B.norm(dim=0), rtol=1e-3, atol=1e-4)  # equal shares


@pytest.mark.parametrize("quantizer", ["nf4", "fp4"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("init", STARTS)
def test_the_error_said_is_the_error_of_the_merged_weights(zoo: Zoo, init: str, kind: str, quantizer: str) -> None:
    base, _, found = begun(zoo, kind, init, quantizer)
    originals = dict(matrices(base.folder.path, set(adapted(base.model))))
    whole = torch.cat([each.flatten() for each in originals.values()]).norm()
    for moment, said in (("before", found.error_before), ("after", found.error_after)):  # type: ignore[union-attr]
        layers = adapted(base.model).items()
        error = [
            originals[path] - (layer.base.weight(torch.float32) if moment == "before" else layer.merged_weight())
            for path, layer in layers
        ]
        assert float(torch.cat([each.flatten() for each in error]).norm() / whole) == pytest.approx(said, rel=1e-4)
    assert found is not None and found.error_after < 0.97 * found.error_before


def test_loftq_removes_what_the_best_update_of_its_rank_can(zoo: Zoo) -> None:
    base, _, found = begun(zoo, "lora", "loftq")
    originals = dict(matrices(base.folder.path, set(adapted(base.model))))
    left = sum(
        torch.linalg.svdvals(originals[path] - layer.base.weight(torch.float32))[6:].square().sum()
        for path, layer in adapted(base.model).items()
    )
    whole = sum(each.square().sum() for each in originals.values())
    assert found is not None and found.error_after <= 1.005 * float((left / whole) ** 0.5)


READ = [(kind, "pissa", quantizer) for kind in ("lora", "rslora", "dora") for quantizer in ("nf4", "dense")]


@pytest.mark.parametrize(("kind", "init", "quantizer"), [*READ, ("lora", "loftq", "nf4"), ("dora", "loftq", "nf4")])
def test_trained_it_is_read_alike_here_and_by_peft_on_the_shared_base(
    zoo: Zoo, kind: str, init: str, quantizer: str, tmp_path: Path
) -> None:
    base, adapter, _ = begun(zoo, kind, init, quantizer)
    move(base.model)
    ours = logits(base.model)
    peft_files.write(tmp_path, base.model, adapter, peft_files.Identity("", None, base.manifest.sha256))
    fresh = load(Model(name=str(zoo(FAMILY)), dtype="float32"), QUANTIZERS[quantizer](), torch.device("cpu"))
    peft_files.attach(fresh.model, peft_files.read(tmp_path), fresh.manifest.sha256)
    torch.testing.assert_close(logits(fresh.model.eval()), ours, rtol=0, atol=1e-5)
    for path, layer in adapted(fresh.model).items():
        mine = adapted(base.model)[path].base.state_dict()
        assert all(torch.equal(value, mine[name]) for name, value in layer.base.state_dict().items())
    theirs: Any = AutoModelForCausalLM.from_pretrained(zoo(FAMILY), dtype=torch.float32)
    for path, layer in adapted(base.model).items():
        theirs.get_submodule(path).weight.data = layer.base.weight(torch.float32).clone()
        torch.testing.assert_close(
            layer.merged_weight(), adapted(fresh.model)[path].merged_weight(), rtol=1e-4, atol=1e-5
        )
    read = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    torch.testing.assert_close(logits(read), ours, rtol=0, atol=1e-3 if kind == "dora" else 1e-4)


def test_a_rank_beyond_the_matrices_and_an_error_that_is_not_there_are_refused(zoo: Zoo) -> None:
    with pytest.raises(AdapterError, match=r"adapter\.rank: 500"):
        begun(zoo, "lora", "pissa", rank=500)
    with pytest.raises(AdapterError, match="16-bit"):
        begun(zoo, "lora", "loftq", "dense")


@pytest.mark.parametrize("init", STARTS)
def test_a_run_says_and_writes_down_what_its_start_removed(zoo: Zoo, init: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 4)
    found = run(recipe_of(zoo(FAMILY), data, tmp_path / "run", f"adapter.init={init}", "train.max_steps=1"))
    assert found["adapter"]["init"] == init and found["adapter"]["rank"] == 4
    error = found["adapter"]["quantization_error"]
    assert 0 < error["error_after"] < error["error_before"] < 0.2
