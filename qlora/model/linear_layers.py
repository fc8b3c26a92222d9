"""Which linear layers of a decoder are quantized and adapted, and which are left out because their class uses them.

A layer can be replaced if its parent only calls it. Mixers of Mamba and its kin read `layer.weight` themselves, some
classes give a linear layer a forward of its own, others keep a matrix in float32: these stay as they are loaded.
"""

import ast
import inspect
import textwrap
from functools import lru_cache

import torch
from torch import nn

from qlora.model.dtypes import kept_in_float32

SETUP_METHODS = ("__init__", "_init_weights", "init_weights", "reset_parameters")


def linear_paths(model: nn.Module) -> list[str]:
    """Paths of the decoder's linear layers in order, without the output head: what is quantized and adapted."""
    left_out = layers_left_out(model)
    return [path for path in _decoder_linears(model) if path not in left_out]


def layers_left_out(model: nn.Module) -> dict[str, str]:
    """Path -> reason, of the decoder's linear layers that can't be replaced: they stay in 16 bits and do not train."""
    readers: dict[str, str] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        names = weights_read_by(type(module))  # type: ignore[arg-type]
        readers |= {prefix + name: type(module).__name__ for name in names}
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
    reasons: dict[str, str] = {}
    for path in _decoder_linears(model):
        linear = model.get_submodule(path)
        if path in readers:
            reasons[path] = f"{readers[path]} reads its weight itself"
        elif type(linear).forward is not nn.Linear.forward or type(linear).__name__.startswith("NonDynamically"):
            reasons[path] = f"{type(linear).__name__} is no plain linear layer"
        elif kept_in_float32(model, f"{path}.weight", dtype):
            reasons[path] = "its class keeps it in float32"
    return reasons


def describe_left_out(model: nn.Module) -> str | None:
    """One line about the layers that are left out: names, number, reasons; None if there are none."""
    reasons = layers_left_out(model)
    if not reasons:
        return None
    groups: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        groups.setdefault(reason, []).append(path.rpartition(".")[2])
    parts = [f"{', '.join(sorted(set(names)))} ({reason})" for reason, names in groups.items()]
    return f"{len(reasons)} linear layers stay in 16 bits and are not adapted: {'; '.join(parts)}"


def _decoder_linears(model: nn.Module) -> list[str]:
    """Paths of all `nn.Linear` of the decoder except the head, in the model's order."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()  # type: ignore[operator]
    linears = {id(module) for module in decoder.modules() if isinstance(module, nn.Linear) and module is not head}
    return [path for path, module in model.named_modules() if id(module) in linears]


@lru_cache(maxsize=512)
def weights_read_by(kind: type) -> frozenset[str]:
    """Attributes `name` (or `a.name`) for which a method of this class reads `self.name.weight` or `self.name.bias`."""
    names: set[str] = set()
    for base in kind.__mro__:
        if base is nn.Module or not base.__module__.startswith("transformers.models."):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        methods = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for method in (node for node in methods if node.name not in SETUP_METHODS):
            names |= {name for node in ast.walk(method) if (name := _read_weight(node))}
    return frozenset(names)


def _read_weight(node: ast.AST) -> str | None:
    """`mixer.out_proj` for the expression `self.mixer.out_proj.weight`."""
    if not isinstance(node, ast.Attribute) or node.attr not in ("weight", "bias"):
        return None
    names: list[str] = []
    value: ast.expr = node.value
    while isinstance(value, ast.Attribute):
        names.append(value.attr)
        value = value.value
    return ".".join(reversed(names)) if names and isinstance(value, ast.Name) and value.id == "self" else None
