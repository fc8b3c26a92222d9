"""float16 compute: products of frozen matrices, nine tenths of a step's arithmetic, in float16; all else is float32.

float16 has three bits more than bfloat16, and ends at 65,504. So norms, embedding, head, adapters, attention and the
residual stream are float32, and a frozen layer rounds its input to float16, multiplies, and returns float32. A matrix
whose values come near the end of float16 multiplies in float32 (training/overflow_map.py finds it).
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qlora.model.linear_layers import frozen_linears

LARGEST = torch.finfo(torch.float16).max  # 65,504


def multiply_in_float16(model: nn.Module, except_paths: Collection[str] = ()) -> None:
    """Let frozen layers multiply in float16, apart from those at `except_paths`: matrices, or stacks of experts."""
    for path, layer in frozen_linears(model).items():
        is_exception = path in except_paths or path.rpartition(".")[0] in except_paths
        layer.product_dtype = None if is_exception else torch.float16


@contextmanager
def float32_products(model: nn.Module) -> Iterator[None]:
    """Inside the block everything is computed in float32."""
    layers = [layer for layer in frozen_linears(model).values() if layer.product_dtype is not None]
    for layer in layers:
        layer.product_dtype = None
    try:
        yield
    finally:
        for layer in layers:
            layer.product_dtype = torch.float16
