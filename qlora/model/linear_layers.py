"""Which linear layers of a decoder are quantized and adapted, and which are left out because their class uses them.

A layer can be replaced if its parent only calls it. Mixers of Mamba and its kin read `layer.weight` themselves, some
classes give a linear layer a forward of its own, others keep a matrix in float32: these stay in the base's dtype.
Layers that text does not reach (the attention to an encoder in the decoder of a translation model) are not adapted.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import nn

from qlora.model.dtypes import kept_in_float32
from qlora.model.module_tree import decoder_of, path_of
from qlora.model.recurrent_mixers import PREFIX, recurrent_mixers
from qlora.quant.linear import FrozenLinear

UNUSED = "a forward of text does not call it"
NOT_IN_PEFT = "PEFT does not adapt it in this class"
# peft.tuners.tuners_utils, _check_lora_target_modules_mamba: a folder with an adapter of these can't be loaded.
PEFT_MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
PEFT_FORBIDDEN = ("out_proj", "conv1d")
WEIGHT_READ = re.compile(r"\bself\.(\w+\.)+(weight|bias)\b")
WRAPPER = re.compile(r"\.base(?=$|\.\d+$)")  # in the path of an adapted matrix, or of an expert's
ROUTERS = ("gate", "router", "shared_expert_gate")  # beside the experts of a layer
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d)
SETUP_METHODS = ("__init__", "_init_weights", "init_weights", "reset_parameters")


def linear_paths(model: nn.Module) -> list[str]:
    """Paths of the decoder's linear layers that are quantized, in order, without the output head."""
    kept = _not_replaceable(model)
    return [path for path in _decoder_linears(model) if path not in kept]


def frozen_linears(model: nn.Module) -> dict[str, FrozenLinear]:
    """Path -> frozen matrix, in the model's order; a wrapped one has its wrapper's path."""
    layers = ((path, module) for path, module in model.named_modules() if isinstance(module, FrozenLinear))
    return {WRAPPER.sub("", path): module for path, module in layers}


def layers_left_out(model: nn.Module) -> dict[str, str]:
    """Path -> reason, of the decoder's linear layers that are not adapted; what can't be replaced stays in 16 bits."""
    unused = (path for path, layer in model.named_modules() if isinstance(layer, FrozenLinear) and not layer.is_used)
    config: Any = model.config
    forbidden = (
        [] if config.model_type not in PEFT_MAMBA else frozen_linears(model) | dict.fromkeys(linear_paths(model))
    )
    reasons = {path: NOT_IN_PEFT for path in forbidden if path.rpartition(".")[2] in PEFT_FORBIDDEN}
    reasons |= _not_replaceable(model) | _stacks_left_out(model)
    return reasons | dict.fromkeys((WRAPPER.sub("", path) for path in unused), UNUSED)


def _not_replaceable(model: nn.Module) -> dict[str, str]:
    """Path -> reason, of the decoder's linear layers that can't be quantized: they stay in 16 bits."""
    readers, mixers = dict[str, str](), {*recurrent_mixers(model)}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        trains = path not in mixers  # theirs is off (recurrent_mixers.py)
        name_of_class = type(module).__name__.removeprefix(PREFIX)
        readers |= {prefix + name: name_of_class for name in weights_read_by(module, trains)}
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
    expert_parents = {path.rpartition(".")[0] for path, _ in model.named_modules() if path.endswith(".experts")}
    reasons: dict[str, str] = {}
    for path in _decoder_linears(model):
        linear = model.get_submodule(path)
        if "pooler" in path.split("."):
            reasons[path] = UNUSED
        elif path in readers:
            reasons[path] = f"{readers[path]} reads its weight itself"
        elif _is_router(path, expert_parents):
            reasons[path] = "it routes tokens to experts"
        elif not is_plain_linear(type(linear)):  # type: ignore[arg-type]
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
    return f"{len(reasons)} matrices are not adapted: {'; '.join(parts)}"


def _decoder_linears(model: nn.Module) -> list[str]:
    """Paths of all `nn.Linear` of the decoder except the head, in the model's order."""
    decoder, head = decoder_of(model), model.get_output_embeddings()  # type: ignore[operator]
    linears = {id(module) for module in decoder.modules() if isinstance(module, nn.Linear) and module is not head}
    return [path for path, module in model.named_modules() if id(module) in linears]


def _stacks_left_out(model: nn.Module) -> dict[str, str]:
    """Stacks of matrices that are parameters of a class outside of transformers' registry of experts functions."""
    return {
        f"{path}.{name}": f"{type(module).__name__} multiplies a stack of matrices itself"
        for path, module in decoder_of(model).named_modules(prefix=path_of(model, decoder_of(model)))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, CONVOLUTIONS)
    }


def _is_router(path: str, expert_parents: set[str]) -> bool:
    """Whether a linear layer is, or belongs to, a router or a gate beside a layer's experts."""
    parts = path.split(".")
    return any(parts[index] in ROUTERS and ".".join(parts[:index]) in expert_parents for index in range(1, len(parts)))


@lru_cache(maxsize=512)
def is_plain_linear(kind: Any) -> bool:
    """Whether a class of linear layers computes x W^T + bias, as `nn.Linear` does: tried on random numbers."""
    if kind.forward is nn.Linear.forward:
        return not kind.__name__.startswith("NonDynamically")  # its parent passes its weight to a fused function
    linear, x = nn.Linear(3, 2, device="cpu", dtype=torch.float32), torch.randn(4, 3, device="cpu", dtype=torch.float32)
    try:
        return torch.allclose(kind.forward(linear, x), linear(x), atol=1e-6)
    except Exception:  # a forward that needs more than a weight and a bias
        return False


def weights_read_by(module: nn.Module, trains: bool = True) -> frozenset[str]:
    """Attributes `name` (or `a.name`) for which a method of the module's class reads `self.name.weight` or `.bias`.

    Branches that a switch of the module turns off (BLOOM's `slow_but_exact`) do not count. trains: whether `training`
    may be on when its forward runs.
    """
    off = {name for name, value in vars(module).items() if value is False and name != "training"}
    off |= set() if trains else {"training"}
    return frozenset(name for name, switches in _reads_of(type(module)) if not switches & off)  # type: ignore[arg-type]


@lru_cache(maxsize=512)
def _reads_of(kind: Any) -> frozenset[tuple[str, frozenset[str]]]:
    """Attributes whose weight a class reads, each with the attributes of `self` that switch its branch."""
    reads: set[tuple[str, frozenset[str]]] = set()
    for base in kind.__mro__:
        if not base.__module__.startswith("transformers.models."):
            continue
        definition = _classes_of(sys.modules[base.__module__]).get(base.__qualname__)
        methods = [node for node in ast.walk(definition) if isinstance(node, ast.FunctionDef)] if definition else []
        for method in (node for node in methods if node.name not in SETUP_METHODS):
            reads |= set(_weight_reads(method, frozenset()))
    return frozenset(reads)


@lru_cache(maxsize=64)
def _classes_of(module: ModuleType) -> dict[str, ast.ClassDef]:
    """Name -> definition of the classes at the top of a module; empty if none of them reads a layer's weight."""
    try:
        source = inspect.getsource(module)
        tree = ast.parse(source) if WEIGHT_READ.search(source) else ast.Module([], [])
    except (OSError, TypeError, SyntaxError):
        return {}
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _weight_reads(node: ast.AST, guards: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """Every `self.mixer.out_proj.weight` below a node, as `mixer.out_proj`, with the switches of its branch."""
    if isinstance(node, ast.Attribute) and node.attr in ("weight", "bias") and (name := _own_attribute(node.value)):
        yield name, guards
    for child in ast.iter_child_nodes(node):
        inside = isinstance(node, ast.If) and child in node.body
        yield from _weight_reads(
            child, guards | _switches(node.test) if isinstance(node, ast.If) and inside else guards
        )


def _switches(test: ast.expr) -> frozenset[str]:
    """Names of the attributes of `self` that must all be true for a branch: `a` and `b` of `self.a and self.b`."""
    parts = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
    return frozenset(name for part in parts if (name := _own_attribute(part)) and "." not in name)


def _own_attribute(value: ast.expr) -> str | None:
    """`mixer.out_proj` for the expression `self.mixer.out_proj`; None for any other."""
    names: list[str] = []
    while isinstance(value, ast.Attribute):
        names.append(value.attr)
        value = value.value
    return ".".join(reversed(names)) if names and isinstance(value, ast.Name) and value.id == "self" else None
