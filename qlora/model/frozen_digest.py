"""Digest of every frozen byte in memory: compared before and after training, it proves that the base did not change."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qlora.quant.linear import FrozenLinear

# Summed at a time. A CPU widens bytes to int64 (8x) to sum them, and its heap keeps the largest size it ever had.
CHUNK_BYTES = {"cuda": 1 << 21, "cpu": 1 << 18}
COLUMNS = 1 << 10  # of the table that a chunk is summed as


def frozen_sha256(model: nn.Module) -> str:
    """A digest over the bytes of all frozen parameters and all buffers, computed on their devices.

    Each chunk is viewed as a table and summed along rows and columns: a changed byte changes a sum of each. Of sharded
    parameters every rank hashes its own shard.
    """
    digest = hashlib.sha256()
    for name, tensor in _frozen(model):
        digest.update(name.encode())
        for sums in _sums(tensor):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


def _frozen(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Frozen tensors by name. `stored()` fetches those of a frozen layer that are streamed from host memory."""
    for path, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        sharded = any(hasattr(value, "to_local") for value in parameters.values())
        values = parameters | (module.stored() if isinstance(module, FrozenLinear) and not sharded else {})
        yield from ((f"{path}.{name}", value) for name, value in values.items() if not value.requires_grad)
        yield from ((f"{path}.{name}", value) for name, value in module.named_buffers(recurse=False))


@torch.no_grad()
def _sums(tensor: Tensor) -> Iterator[Tensor]:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    flat = local.detach().contiguous().reshape(-1).view(torch.uint8)
    step = CHUNK_BYTES["cuda" if flat.is_cuda else "cpu"]
    for start in range(0, flat.numel(), step):
        chunk = flat[start : start + step]
        table = chunk[: chunk.numel() // COLUMNS * COLUMNS].view(-1, COLUMNS)
        if len(table):  # each part is a wait for the GPU
            yield table.sum(0, dtype=torch.int64)
            yield table.sum(1, dtype=torch.int64)
        if table.numel() < chunk.numel():
            yield chunk[table.numel() :].long()
