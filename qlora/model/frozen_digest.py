"""Did the frozen base stay as it was loaded? A digest of every frozen byte in memory, before and after."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qlora.quant.linear import FrozenLinear

# Looked at at a time. A CPU widens them to eight times as many to sum them, in a heap that keeps what it ever held.
CHUNK_BYTES = {"cuda": 1 << 21, "cpu": 1 << 18}
LINE = 1 << 10  # columns of the table that a chunk is summed as


def frozen_sha256(model: nn.Module) -> str:
    """A digest over the bytes of all parameters that are frozen, and of all buffers, where they lie.

    Of what is sharded, over this process's share: the shares are all that there is of it.

    Each chunk is summed along the rows and the columns of a table, on its device: a changed byte changes a sum of each.
    """
    digest = hashlib.sha256()
    for name, tensor in _frozen(model):
        digest.update(name.encode())
        for sums in _sums(tensor):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


def _frozen(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Frozen tensors by name; a matrix is asked for its own, since it may be somewhere else at the moment."""
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        shared = any(hasattr(value, "to_local") for value in own.values())
        values = own | (module.stored() if isinstance(module, FrozenLinear) and not shared else {})
        yield from ((f"{path}.{name}", value) for name, value in values.items() if not value.requires_grad)
        yield from ((f"{path}.{name}", value) for name, value in module.named_buffers(recurse=False))


@torch.no_grad()
def _sums(tensor: Tensor) -> Iterator[Tensor]:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    flat = local.detach().contiguous().reshape(-1).view(torch.uint8)
    step = CHUNK_BYTES["cuda" if flat.is_cuda else "cpu"]
    for start in range(0, flat.numel(), step):
        chunk = flat[start : start + step]
        whole = chunk[: chunk.numel() // LINE * LINE].view(-1, LINE)
        yield whole.sum(0, dtype=torch.int64)
        yield whole.sum(1, dtype=torch.int64)
        yield chunk[whole.numel() :].long()
