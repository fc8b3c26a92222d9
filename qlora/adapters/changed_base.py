"""Adapters of PEFT whose start changed the base (PiSSA, OLoRA), as updates of the unchanged base.

Such a start subtracts s B0 A0 from W before training, and the file holds A and B alone. B0 and A0 follow from W, so
they are computed again and become part of the pair: s (B A - B0 A0) is a LoRA of rank 2 R on the base itself.

    pissa   s B0 A0 = U U^T W, U the R leading left singular vectors of W       arXiv:2404.02948
    olora   B0 A0 = Q R, the first R columns and rows of W's QR decomposition   arXiv:2406.01775
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qlora.adapters.peft_config import module_settings, plain_fields
from qlora.adapters.peft_files import CONFIG, AdapterFile
from qlora.adapters.peft_starts import changed_start
from qlora.adapters.plain_lora import largest_rank, pad

OVERSAMPLING, MAX_ITERATIONS = 4, 100
PRECISION = 1e-7  # sine of the largest angle between the computed directions and the exact ones
# Paths -> (path, original W [O, I]), one at a time.
OriginalWeights = Callable[[set[str]], Iterable[tuple[str, Tensor]]]


@torch.no_grad()
def restore_base(
    file: AdapterFile,
    originals: OriginalWeights,
    device: torch.device,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> AdapterFile:
    """The adapter as updates of the unchanged base, its scaling in B; `file` itself if its start changed nothing."""
    start = changed_start(file.folder / CONFIG, file.config)
    if start is None:
        return file
    pairs = dict(file.pairs)
    for number, (path, weight) in enumerate(originals(set(pairs))):
        report(number, len(pairs))
        a, b = pairs[path]
        if (b.shape[0], a.shape[1]) != weight.shape or not a.shape[0] == b.shape[1] <= min(weight.shape):
            continue  # attaching it reports the shapes
        scaling = module_settings(file.config, path, a.shape[0]).scaling
        a0, b0 = STARTS[start](weight.to(device), a.shape[0])
        factor = scaling if start == "olora" else 1.0  # the scaling of PiSSA is in A0 and B0
        pairs[path] = torch.cat([a.float(), a0.cpu()]), torch.cat([scaling * b.float(), -factor * b0.cpu()], dim=1)
    pairs = pad(pairs, largest_rank(pairs))
    return replace(file, pairs=pairs, config={**file.config, **plain_fields(largest_rank(pairs))}, is_changed=True)


def _pissa(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A0 [R, I] and B0 [O, R], their product the best approximation of W [O, I] of this rank."""
    right = leading_directions(weight.double(), rank)
    return right.t().float(), (weight.double() @ right).float()


def leading_directions(matrix: Tensor, rank: int) -> Tensor:
    """The leading right singular vectors [I, R] of a float64 matrix [O, I], in any order, to float32's precision.

    By subspace iteration until the error's bound, residual over gap, is small: the SVD of a large matrix takes minutes.
    """
    width = OVERSAMPLING * rank + 16
    if 2 * width < min(matrix.shape):
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float64).to(matrix.device)
        for _ in range(MAX_ITERATIONS):
            basis = torch.linalg.qr(matrix.t() @ (matrix @ basis)).Q
            image = matrix.t() @ (matrix @ basis)
            values, rotation = torch.linalg.eigh(basis.t() @ image)
            leading: Tensor = (basis @ rotation)[:, -rank:]
            residual = torch.linalg.vector_norm((image @ rotation)[:, -rank:] - leading * values[-rank:])
            if residual <= PRECISION * (values[-rank] - values[-rank - 1]):
                return leading
    right: Tensor = torch.linalg.svd(matrix, full_matrices=False).Vh[:rank]
    return right.t()


def _olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A0 [R, I] and B0 [O, R] of the QR decomposition of W [O, I]."""
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


STARTS: Mapping[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {"pissa": _pissa, "olora": _olora}
