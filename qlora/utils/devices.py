"""Whether two torch devices are the same one. The only place that compares devices with an index."""

import torch


def same_device(first: torch.device, second: torch.device) -> bool:
    """`cuda` and `cuda:0` are the same for a process, which uses one GPU: only tensors always have an index.

    Devices of one type with different indices differ.
    """
    if first.type != second.type:
        return False
    return first.index is None or second.index is None or first.index == second.index
