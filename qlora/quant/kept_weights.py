"""Dequantized weights that are kept while a model answers: without them every token dequantizes the same matrices.

On a CPU that takes more than half of the time of a token. A large model keeps its first layers only.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from qlora.quant.fourbit_linear import FourBitLinear

KEPT_BYTES = 256 * 2**20  # float32 weights of about 67 million parameters


@contextmanager
def weights_kept(model: nn.Module, kept_bytes: int = KEPT_BYTES) -> Iterator[None]:
    """Inside the block 4-bit layers on a CPU dequantize W once, the first ones that fit `kept_bytes` in float32.

    Not layers whose tensors are fetched, streamed or sharded. Nothing may write into W.
    """
    layers = []
    for layer in model.modules():
        if isinstance(layer, FourBitLinear) and layer.fetch is None and layer.device.type == "cpu":
            kept_bytes -= 4 * layer.out_features * layer.in_features
            if kept_bytes < 0:
                break
            layers.append(layer)
    for layer in layers:
        layer.keeps_weight = True
    try:
        yield
    finally:
        for layer in layers:
            layer.keeps_weight, layer.kept_weight = False, None
