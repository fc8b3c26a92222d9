"""Memory that commands which only answer spend on speed; training never does, as no plan counts it."""

from collections.abc import Iterator
from contextlib import contextmanager

from qlora.memory.malloc import keep_freed_memory
from qlora.model.load_base import Base
from qlora.quant.kept_weights import weights_kept


@contextmanager
def inference_memory(base: Base) -> Iterator[None]:
    """Inside the block, on a CPU, freed memory is reused and dequantized weights are kept up to KEPT_BYTES."""
    if base.device.type == "cpu":
        keep_freed_memory()
    with weights_kept(base.model):
        yield
