"""Every Triton kernel compiles to code of NVIDIA GPUs on a machine without one: the interpreter can not show that."""

import re
from importlib.util import find_spec
from typing import Any

import pytest

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qlora.model.kernels import norm_kernel, product_kernel, rotary_kernel
from qlora.quant import triton_kernel

POINTERS = {"weight", "grad", "x", "out", "gate", "up", "gate_out", "up_out", "query", "key", "query_out", "key_out",
            "cos", "sin"}  # fmt: skip  # in the compute dtype
OTHERS = {"rstd": "*fp32", "eps": "fp32", "absmax": "*u8", "codes": "*u8", "nested_absmax": "*fp32", "offset": "*fp32",
          "absmax_levels": "*fp32", "levels": "*fp32"}  # fmt: skip
HEADS: dict[str, Any] = {"HALF": 64, "HEADS": rotary_kernel.HEADS}
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{f"norm forward {form}": (norm_kernel._forward, {"FORM": form, "BLOCK": 4096, "BLOCKS": 1}) for form in range(3)},
    **{f"norm backward {form}": (norm_kernel._backward, {"FORM": form, "BLOCK": 8192, "BLOCKS": 2}) for form in (0, 2)},
    **{f"product forward {act}": (product_kernel._forward, {"ACT": act, "BLOCK": 1024}) for act in range(3)},
    **{f"product backward {act}": (product_kernel._backward, {"ACT": act, "BLOCK": 1024}) for act in range(3)},
    "rotary": (rotary_kernel._rotate_pair, {"INVERSE": False, **HEADS}),
    "rotary backward": (rotary_kernel._rotate_pair, {"INVERSE": True, **HEADS}),
    "dequantize": (triton_kernel._dequantize, {"BLOCK": 64, "NESTED": 256, "DOUBLE": True, "BYTES": 1024}),
}
GPUS = {75: "*fp16", 80: "*bf16", 90: "*bf16"}  # compute capability -> compute dtype: T4, A100, H100


def assembly(kernel: Any, constants: dict[str, Any], capability: int) -> str:
    """PTX of a kernel."""
    dtype = GPUS[capability]
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: dtype if name in POINTERS else OTHERS.get(name, "i32") for name in names}
    source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
    return str(triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"])


@pytest.mark.sample(of=6)
@pytest.mark.parametrize(
    "capability", [pytest.param(75, marks=pytest.mark.slow), 80, pytest.param(90, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles(name: str, capability: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = assembly(*KERNELS[name], capability)
    assert re.search(rf"\.target sm_{capability}", code) and "st.global" in code
