"""Error of the second quantization: what storing a decoded matrix in 4 bits changes."""

import torch
from torch import Tensor

from qlora.quant.linear import FrozenLinear
from qlora.quant.released.released_tensor import row_slices


def relative_error(weight: Tensor, layer: FrozenLinear) -> float:
    """||W - W'|| / ||W||, Frobenius, of a decoded matrix W [O, I] and the W' that its frozen layer rebuilds.

    W' is rebuilt in W's dtype: one more tensor of W's size. 0 for a matrix of zeros.
    """
    rebuilt, norms = layer.weight(weight.dtype), list[Tensor]()
    for part in row_slices(*weight.shape):
        exact = weight[part].to(rebuilt.device).float()
        norms.append(torch.stack([torch.linalg.vector_norm(exact), torch.linalg.vector_norm(exact - rebuilt[part])]))
    size, error = torch.linalg.vector_norm(torch.stack(norms).double(), dim=0).tolist()
    return float(error / size) if size else 0.0
