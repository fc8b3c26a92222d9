"""Proof that a device computes: an NF4 round trip against the readable reference, and training steps whose loss falls.

Some GPUs return zeros or wrong numbers without an error. So values are compared with the CPU's, not only produced: the
first loss of a small adapted block in each dtype of the device, and its fall over a few steps.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.adapters.lora import Lora
from qlora.errors import first_line
from qlora.model.attention import document_attention
from qlora.model.dtypes import dtype_name, stored_dtype
from qlora.quant import blockwise
from qlora.quant.fourbit_linear import FourBitLinear
from qlora.quant.levels import LEVELS
from qlora.quant.nf4 import Nf4
from qlora.training.loss_scale import LossScale, unscale
from qlora.utils.devices import has_bfloat16, synchronize

QUANTIZER = Nf4(double=True, block=64)
WIDTH, HEADS, TOKENS, STEPS, LEARNING_RATE = 128, 4, 32, 4, 1e-2
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the first loss, relative to the CPU's


@dataclass(frozen=True)
class Proof:
    """What one check of a device showed."""

    name: str  # `NF4`, or a dtype
    works: bool
    result: str

    def as_json(self) -> dict[str, Any]:
        """The check as an object of `doctor --json`."""
        return {"name": self.name, "works": self.works, "result": self.result}


def prove(device: torch.device) -> list[Proof]:
    """The NF4 round trip, then training steps in each dtype that the device has."""
    dtypes = [torch.float32, torch.float16, *([torch.bfloat16] if has_bfloat16(device) else [])]
    proofs = [_guarded("NF4", lambda: prove_round_trip(device))]
    return proofs + [_guarded(dtype_name(dtype), lambda dtype=dtype: prove_training(device, dtype)) for dtype in dtypes]


def prove_round_trip(device: torch.device) -> Proof:
    """Dequantized values equal the readable reference's, from the stored bytes; none is far from the original."""
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    layer: Any = QUANTIZER.quantize(weight.to(device))
    rebuilt, expected = layer.weight(torch.float32).cpu(), reference(layer)
    error = float((rebuilt - weight).abs().max())
    if not rebuilt.any():
        return Proof("NF4", False, "every dequantized value is zero")
    difference = float((rebuilt - expected).abs().max())
    if not difference <= 1e-6 * float(expected.abs().max()):
        return Proof("NF4", False, f"dequantized values differ from the reference by {difference:.3g}")
    limit = 0.2 * float(weight.abs().max())  # half the widest gap of the levels is 0.152 of a block's largest value
    return Proof("NF4", error <= limit, f"round trip equal to the reference, off by at most {error:.3f}")


def reference(layer: FourBitLinear) -> Tensor:
    """W [O, I] float32 on the CPU from the stored tensors of a double-quantized NF4 layer, in plain torch."""
    stored = {name: value.detach().cpu() for name, value in layer.stored().items()}
    absmax = blockwise.restore_absmax(stored["absmax"], stored["nested_absmax"], stored["offset"])
    levels = LEVELS[layer.kind]()
    return blockwise.dequantize(stored["codes"], absmax, levels, layer.block, (layer.out_features, layer.in_features))


def prove_training(device: torch.device, dtype: torch.dtype) -> Proof:
    """The loss of a small adapted block: the CPU's in float32 at first, less after a few steps."""
    losses, (expected, *_) = train_block(device, dtype), train_block(torch.device("cpu"), torch.float32)
    text = f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {STEPS} steps, {expected:.4f} at first on the CPU in float32"
    is_close = abs(losses[0] - expected) <= TOLERANCE[dtype] * expected
    return Proof(dtype_name(dtype), is_close and losses[-1] < 0.99 * losses[0], text)


def train_block(device: torch.device, dtype: torch.dtype) -> list[float]:
    """The losses of a few steps of attention and MLP with NF4 weights and LoRA, from fixed random numbers."""
    block = _Block(device, dtype)
    generator = torch.Generator().manual_seed(1)
    x, target = (torch.randn(1, TOKENS, WIDTH, generator=generator) for _ in range(2))
    x, target = x.to(device, stored_dtype(dtype)), target.to(device)
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    scale = LossScale().value if dtype == torch.float16 else 1.0
    losses = []
    for _ in range(STEPS):
        loss = F.mse_loss(block(x).float(), target)
        (loss * scale).backward()
        unscale(parameters, scale)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    synchronize(device)
    return losses


class _Block(nn.Module):
    """x + attention(x), then x + MLP(x), whose matrices are NF4 with LoRA; the same numbers on every device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        generator, lora = torch.Generator().manual_seed(0), Lora(8, 16, 0.0)
        self.layers = nn.ModuleDict()
        for name in ("query", "key", "value", "out", "up", "down"):
            weight = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
            layer = lora.wrap(QUANTIZER.quantize(weight).to(device))  # quantized on the CPU: the same bytes everywhere
            layer.base.product_dtype = torch.float16 if dtype == torch.float16 else None
            layer.reset(generator)
            self.layers[name] = layer

    def forward(self, x: Tensor) -> Tensor:
        """X [1, T, I] -> [1, T, I]."""
        query, key, value = (self._heads(self.layers[name](x)) for name in ("query", "key", "value"))
        attended, _ = document_attention(self, query, key, value, None)
        hidden: Tensor = x + self.layers["out"](attended.flatten(2))
        update: Tensor = self.layers["down"](F.silu(self.layers["up"](hidden)))
        return hidden + update

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(2, (HEADS, -1))  # type: ignore[no-untyped-call]
        return heads.transpose(1, 2)


def _guarded(name: str, check: Any) -> Proof:
    """The proof, or that a library failed: a driver can raise anything."""
    try:
        proof: Proof = check()
    except Exception as error:
        return Proof(name, False, f"does not run ({type(error).__name__}: {first_line(error)})")
    return proof
