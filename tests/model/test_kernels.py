"""The fused kernels of a decoder layer: Triton's against their references, the choice, their composition."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from support.paths import ROOT
from support.pretended_gpu import pretended_gpu
from support.tiny_models import FAMILIES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from qlora.model.kernels import gated_product, rms_norm, rotary_pair
from qlora.model.kernels.kernel_choice import is_better, random_inputs
from qlora.model.kernels.rms_norm import NormForm
from qlora.utils.kernel_notes import take_kernel_notes
from qlora.utils.rematerialize import origin_of

GPU = torch.device("cuda")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (pip install triton)")
FORM = NormForm(1e-6, rms_norm.ROUND_FIRST)
WEIGHT = torch.linspace(0.5, 2, 12)


@needs_triton
@pytest.mark.sample(of=2)
@pytest.mark.parametrize("name", ["kernels", "dequantization"])
def test_the_kernels_equal_their_references_in_the_interpreter(name: str) -> None:
    """In a process of its own: Triton reads the switch when it is imported. Those of `quant/` too."""
    options = ("-n", "0", "-q", "-p", "no:cacheprovider", f"support/interpreted_{name}.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=ROOT / "tests", env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert process.returncode == 0 and process.stdout.count(".") > 1, process.stdout[-3000:]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


COS, SIN = random(1, 5, 8), random(1, 5, 8, seed=1)


def product(fused: bool, *sources: Tensor) -> Tensor:
    if fused:
        return gated_product.gated_product(0, *sources)
    return gated_product.reference(*(sources[0].chunk(2, dim=-1) if len(sources) == 1 else sources), act=0)


def rotary(fused: bool, *pair: Tensor) -> Tensor:
    return torch.cat((rotary_pair.rotary_pair if fused else rotary_pair.reference)(*pair, COS, SIN), dim=1)


def norm(fused: bool, x: Tensor) -> Tensor:
    return (rms_norm.rms_norm if fused else rms_norm.reference)(x, WEIGHT, FORM)


# name -> function of (fused, inputs), and the shapes of its inputs
CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "norm": (norm, [(2, 5, 12)]),
    "product": (product, [(2, 5, 12)] * 2),
    "halves": (product, [(2, 5, 24)]),
    "rotary": (rotary, [(2, 4, 5, 8), (2, 2, 5, 8)]),
}


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_fused_function_has_the_values_and_gradients_of_its_reference(case: str, recomputes: bool) -> None:
    function, shapes = CASES[case]
    results = []
    for fused in (True, False):
        leaves = [random(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
        out = checkpoint(function, fused, *leaves, use_reentrant=False) if recomputes else function(fused, *leaves)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, random(*out.shape, seed=9))))
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["norm", "product", "halves"])
def test_a_fused_result_can_be_made_again_from_what_is_saved(case: str) -> None:
    function, shapes = CASES[case]
    saved: list[Tensor] = []
    leaves = [random(*shape).requires_grad_() for shape in shapes]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        result = function(True, *leaves)
    origin = origin_of(result)
    assert origin is not None and torch.equal(origin.rematerialization.run(origin.sources), result)
    assert sum(tensor.numel() for tensor in saved) <= sum(leaf.numel() for leaf in leaves) + len(WEIGHT) + 10


@pytest.mark.parametrize(("family", "order"), [
    ("llama", rms_norm.ROUND_FIRST), ("qwen3", rms_norm.ROUND_FIRST), ("gemma2", rms_norm.ADD_ONE),
    ("gemma3", rms_norm.ADD_ONE), ("gpt_neox", None),
])  # fmt: skip
def test_the_form_of_a_norm_is_measured(family: str, order: int | None) -> None:
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.bfloat16)
    norms = [module for module in model.modules() if type(module).__name__.endswith("Norm")]
    forms = [rms_norm.form_of(norm) for norm in norms]
    assert norms and {form.order if form else None for form in forms} == {order}


def test_the_kind_of_an_activation_is_measured() -> None:
    kinds = (nn.SiLU(), nn.GELU(approximate="tanh"), nn.GELU(), nn.ReLU())
    assert [gated_product.kind_of(kind, torch.bfloat16) for kind in kinds] == [0, 1, 2, None]


def test_other_rotary_layouts_are_left_to_the_model() -> None:
    query, key = random(2, 4, 5, 8), random(2, 2, 5, 8)
    assert rotary_pair.takes(query, key, COS, SIN)
    part, wide, own = COS[..., :4], COS.double(), COS.expand(3, -1, -1)
    assert not any(rotary_pair.takes(query, key, cos, cos) for cos in (part, wide, own))


@needs_triton
def test_a_kernel_is_chosen_where_it_is_right_and_faster() -> None:
    def slow(x: Tensor) -> Tensor:
        return torch.ops.aten.clone(x.exp())

    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("no compiler")

    take_kernel_notes()  # of earlier tests
    with pretended_gpu():
        inputs = random_inputs([(4, 8)], GPU, torch.float32)
        choices = [is_better("exp", fused, slow, inputs) for fused in (torch.exp, torch.expm1, fails)]
        choices.append(is_better("exp", slow, torch.exp, inputs))
    assert choices == [True, False, False, False]
    reasons = ("gives other numbers here", "does not run here (no compiler)", "is not faster here")
    assert take_kernel_notes() == [f"exp: torch's own operators run, since the fused kernel {text}" for text in reasons]


@needs_triton
def test_a_probe_inside_a_recomputed_layer_changes_nothing() -> None:
    calls: list[bool] = []

    def layer(x: Tensor) -> Tensor:
        if not calls:  # as with a cache: in the first forward only
            calls.append(is_better("exp", torch.exp, lambda rows: rows.exp().clone(), [x.detach()]))
        return x.sin().exp()

    with pretended_gpu():
        (x,) = random_inputs([(4, 8)], GPU, torch.float32)
        leaf = x.requires_grad_()
        checkpoint(layer, leaf, use_reentrant=False).sum().backward()
    assert calls == [True] and leaf.grad is not None
