"""Attention modules whose query, key and value are one function, and whose rotary embedding is one kernel, on a GPU.

A lean module is an instance of a subclass of the original's class, with the same children. What it passes to the
attention function is compared with the original's call, bit for bit, on stand-ins for its matrices: so no class is
assumed to be like another. With a KV cache, on a CPU and under torch.compile the original's forward runs.
"""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora.model.kernels import rotary_pair
from qlora.model.lean_modules import outputs_of
from qlora.model.module_tree import set_by_path

PROJECTIONS, HEAD_NORMS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_norm", "k_norm")
CACHES = ("cache", "past_key_values", "past_key_value")  # names of the KV cache in versions of transformers
RECORDER = "qlora_recorder"
CHECK_TOKENS, CHECK_WIDTH = 3, 8


class LeanAttention(nn.Module):
    """The forward of Llama's attention and its likes, with head norms where the original has them."""

    constants: Mapping[str, Any]  # what the original passes to the attention function: its window, soft cap ...
    named: frozenset[str]  # parameters of the original's forward, which it does not pass on
    fuses = True  # False: the same steps by torch's own operators

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Hidden states [B, T, I] -> output [B, T, I], and what the attention function returns beside it."""
        module: Any = self
        attend: Any = ALL_ATTENTION_FUNCTIONS.get(module.config._attn_implementation)
        has_cache = bool(args) or any(kwargs.get(name) is not None for name in CACHES)
        runs_here = attend is not None and (hidden_states.is_cuda or not self.fuses)  # None: eager
        if has_cache or not runs_here or position_embeddings is None or torch.compiler.is_compiling():
            return super().forward(hidden_states, position_embeddings, *args, **kwargs)
        shape = (*hidden_states.shape[:-1], -1, module.head_dim)
        outputs = outputs_of(hidden_states, module.q_proj, module.k_proj, module.v_proj)
        query, key, value = (output.view(shape) for output in outputs)
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        query, key = self._rotate(query, key, *position_embeddings)
        passed = {name: argument for name, argument in kwargs.items() if name not in self.named}
        mask = kwargs.get("attention_mask")
        output, weights = attend(
            self, query, key, value, mask, dropout=0.0, scaling=module.scaling, **self.constants, **passed
        )
        return module.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    def _rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        fused = self.fuses and rotary_pair.is_chosen(query, key, cos, sin)
        return (rotary_pair.rotary_pair if fused else rotary_pair.reference)(query, key, cos, sin)


def replace_attention(model: nn.Module) -> int:
    """Replace every attention module whose lean version makes the same call; returns how many."""
    replaced = 0
    for path, module in list(model.named_modules()):
        lean = lean_attention_of(module)
        if lean is not None:
            set_by_path(model, path, lean)
            replaced += 1
    return replaced


def lean_attention_of(module: nn.Module) -> LeanAttention | None:
    """The lean version of an attention module; None if it has another form, or makes another call."""
    children = {name for name, _ in module.named_children()}
    if isinstance(module, LeanAttention) or children not in ({*PROJECTIONS}, {*PROJECTIONS, *HEAD_NORMS}):
        return None
    try:
        lean: Any = _derived(module)
        twins = [_on_stand_ins(attention) for attention in (module, lean)]
        expected = _recorded(twins[0])
        named, options = frozenset(inspect.signature(type(module).forward).parameters), expected[1]
        constants = {name: value for name, value in options.items() if name not in ("dropout", "scaling", "own")}
        plain = all(value is None or isinstance(value, bool | int | float | str) for value in constants.values())
        for attention in (lean, twins[1]):
            attention.constants, attention.named = constants, named
        twins[1].fuses = False
        return lean if plain and _same_calls(expected, _recorded(twins[1])) else None
    except Exception:  # a module that takes or passes something else
        return None


def _derived(module: Any) -> LeanAttention:
    lean = copy.copy(module)
    kind = type(module)
    lean.__class__ = type(f"Lean{kind.__name__}", (LeanAttention, kind), {"__module__": __name__})
    return lean  # type: ignore[no-any-return]


class _StandInNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """X [..., D], scaled by its position in the last dimension."""
        return x * torch.arange(1, x.shape[-1] + 1)


def _on_stand_ins(module: Any) -> Any:
    """The module with small random matrices on the CPU, and with the recorder as its attention function."""
    twin = copy.copy(module)
    widths = [getattr(module, name).out_features for name in PROJECTIONS[:3]]
    torch_state = torch.get_rng_state()
    torch.manual_seed(0)
    twin._modules = {
        name: nn.Linear(CHECK_WIDTH, width, bias=False) for name, width in zip(PROJECTIONS[:3], widths, strict=True)
    }
    twin._modules["o_proj"] = nn.Linear(widths[0], CHECK_WIDTH, bias=False)
    torch.set_rng_state(torch_state)
    twin._modules |= {name: _StandInNorm() for name in HEAD_NORMS if name in module._modules}
    twin.config = copy.copy(module.config)
    twin.config._attn_implementation = RECORDER
    twin.training = True  # a dropout would show
    return twin


@torch.no_grad()
def _recorded(twin: Any) -> tuple[list[Tensor], dict[str, Any], Tensor]:
    """Query, key and value of the module's call, its keyword arguments, and the module's output."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, CHECK_TOKENS, CHECK_WIDTH), *[(1, CHECK_TOKENS, twin.head_dim)] * 2]
    x, cos, sin = (torch.randn(shape, generator=generator) for shape in shapes)
    calls: list[tuple[list[Tensor], dict[str, Any]]] = []
    output, _ = twin(x, position_embeddings=(cos, sin), attention_mask=None, own=calls)
    ((qkv, options),) = calls
    return qkv, options, output


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, own: Any, **options: Any
) -> tuple[Tensor, None]:
    """The recorder: an attention function that keeps its arguments and returns the query."""
    own.append(([query, key, value], options))
    return query.transpose(1, 2), None


def _same_calls(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    tensors = zip((*one[0], one[2]), (*other[0], other[2]), strict=True)
    return one[1] == other[1] and all(torch.equal(left, right) for left, right in tensors)


AttentionInterface.register(RECORDER, _record)
