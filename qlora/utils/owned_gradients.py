"""Gradients that a backward function has computed and that go to one reader only, which may write over them.

Autograd hands the same tensor to several readers where a sum passes its gradient on, so a function marks only what goes
straight to a function of this package. A mark is kept by the tensor, and lost where autograd makes a sum.
"""

import torch
from torch import Tensor

ATTRIBUTE = "qlora_owned"


def mark_owned(gradient: Tensor) -> Tensor:
    """Mark a gradient that was just computed, and that only its reader will use."""
    if not torch.compiler.is_compiling():
        setattr(gradient, ATTRIBUTE, True)
    return gradient


def is_owned(gradient: Tensor) -> bool:
    """Whether the reader may write over a gradient."""
    return not torch.compiler.is_compiling() and getattr(gradient, ATTRIBUTE, False)
