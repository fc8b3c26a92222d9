"""Regional compilation: torch.compile on each decoder layer, one graph for all layers of a kind.

The loss, the loop and the recomputation of layers stay outside, so that the graph of one layer serves the whole model.
"""

import shutil

import torch
from torch import nn
from torch.utils._triton import has_triton

from qlora.errors import InputError
from qlora.memory.activation_recompute import decoder_layers
from qlora.model.recurrent_mixers import mixers_of

COMPILERS = ("g++", "c++", "clang++")


def compile_layers(model: nn.Module, device: torch.device) -> int:
    """Compile every decoder layer of `model` on its first forward; returns the number of layers.

    InputError where the machine lacks what torch.compile needs: Triton for a GPU, a C++ compiler for a CPU.
    """
    if device.type == "cpu" and not any(shutil.which(compiler) for compiler in COMPILERS):
        raise InputError(
            f"train.compile: true, but this machine has no C++ compiler ({', '.join(COMPILERS)}). Install g++, "
            "or leave train.compile at false."
        )
    if device.type == "cuda" and not has_triton():
        raise InputError(
            "train.compile: true, but Triton is not installed. Install it, or leave train.compile at false."
        )
    layers = decoder_layers(model)
    for mixer in mixers_of(model):  # their loops over documents and chunks have other lengths in every step
        mixer.forward = torch.compiler.disable(mixer.forward)  # type: ignore[method-assign]
    for layer in layers:
        layer.compile(dynamic=True)  # sequences differ in length and in their documents
    return len(layers)
