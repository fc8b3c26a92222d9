"""How the tensors of a model lie in a GGUF file: names, the order of rows, shifted norms, stacked experts; and back."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora.errors import InputError
from qlora.exporters.gguf.gguf_architectures import OTHER_WAY, Architecture, head_size
from qlora.exporters.gguf.gguf_file import tensor_namer
from qlora.model.meta_model import build_meta_model

Change = Callable[[Tensor], Tensor]
EXPERT = re.compile(r"(?P<stack>.+\.experts\.\w+)\.(?P<expert>\d+)\.(?P<leaf>weight|bias)")


def _same(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class Placement:
    """One tensor of a file. `sources`: the model's tensors that it holds, more than one for a stack of experts.

    `change` puts values into the file's order of rows, `undo` back; both keep the shape.
    """

    name: str
    sources: tuple[str, ...]
    change: Change = _same
    undo: Change = _same
    half: int | None = None  # of the rows of a gated expert: 0 (gate), 1 (up); None: all rows
    alternates: bool = False  # rows of gate and up alternate; else one half follows the other

    @property
    def is_stack(self) -> bool:
        """Whether the tensor holds one tensor for each expert."""
        return EXPERT.fullmatch(self.sources[0]) is not None

    def part(self, values: Tensor) -> Tensor:
        """What of a source's values lies in this tensor."""
        if self.half is None:
            return values
        return values[self.half :: 2] if self.alternates else values.chunk(2)[self.half]

    def join(self, halves: Sequence[Tensor]) -> Tensor:
        """A source's values from its halves in this tensor and the other one, gate first."""
        return torch.stack(list(halves), 1).flatten(0, 1) if self.alternates else torch.cat(list(halves))

    def make(self, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor's values from the model's; `read` computes one of them."""
        parts = [self.part(read(source)) for source in self.sources]
        return torch.stack(parts) if self.is_stack else self.change(parts[0])


def placements(architecture: Architecture, model: Any) -> list[Placement]:
    """Every tensor of a model's file, in the model's order. InputError for one that llama.cpp has no place for.

    model: on `meta`; a head that is tied to the embedding is left out unless the architecture stores it always.
    """
    config = model.config.get_text_config()
    namer, result = tensor_namer(architecture.name, config.num_hidden_layers), list[Placement]()
    for name, sources in _grouped(_stored_names(architecture, model)).items():
        result += _place(architecture, config, namer, name, sources)
    return result


def _stored_names(architecture: Architecture, model: Any) -> list[str]:
    tied: Mapping[str, str] = dict(model.all_tied_weights_keys)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in tied]
    if not architecture.has_head:
        head = next((name for name in names if name.startswith("lm_head.")), None)
        if head:
            raise InputError(
                f"--to gguf: llama.cpp's {architecture.name} has no head beside the embedding, but {head} was trained "
                "to differ from it. Use --to merged."
            )
    return [*names, *tied] if architecture.always_has_head else names


def _grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Name in the file's terms -> the model's tensors: one, or all experts of a stack."""
    groups: dict[str, list[str]] = {}
    for name in names:
        match = EXPERT.fullmatch(name)
        groups.setdefault(f"{match['stack']}.{match['leaf']}" if match else name, []).append(name)
    return groups


def _place(
    architecture: Architecture, config: Any, namer: Callable[[str], str | None], name: str, sources: Sequence[str]
) -> list[Placement]:
    halves: list[tuple[str, int | None]] = [(name, None)]
    if ".experts.gate_up_proj." in name:
        halves = [(name.replace("gate_up_proj", part), half) for half, part in enumerate(("gate_proj", "up_proj"))]
    result = []
    for part, half in halves:
        plain = part.replace("model.language_model.", "model.")
        target = namer(plain)
        if target is None:
            raise InputError(f"--to gguf: llama.cpp's {architecture.name} has no place for {name}. {OTHER_WAY}")
        target = target if target.endswith((".weight", ".bias")) else f"{target}.weight"  # gpt-oss: sinks
        changes = row_changes(architecture, config, plain)
        result.append(Placement(target, tuple(sources), *changes, half, architecture.alternates_gate))
    return result


def row_changes(architecture: Architecture, config: Any, name: str) -> tuple[Change, Change]:
    """How the values of a tensor change on the way into the file, and back."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    if architecture.norm_shift and module.endswith("norm"):
        return lambda values: values.float() + architecture.norm_shift, lambda values: values - architecture.norm_shift
    size = head_size(config)
    if architecture.permutes_heads and module in ("q_proj", "k_proj"):
        return lambda values: regroup(values, (2, size // 2)), lambda values: regroup(values, (size // 2, 2))
    if architecture.splits_heads and module == "query_key_value":
        heads = config.num_attention_heads
        return (
            lambda values: regroup(values, (heads, 3), inner=size),
            lambda values: regroup(values, (3, heads), inner=size),
        )
    return _same, _same


def regroup(values: Tensor, sizes: tuple[int, int], inner: int = 1) -> Tensor:
    """The rows of `values`, counted by (..., a, b, inner) with (a, b) = sizes, in the order (..., b, a, inner)."""
    return values.reshape(-1, *sizes, inner, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def placements_by_source(architecture: Architecture, model: Any) -> dict[str, list[Placement]]:
    """The model's tensor -> the tensors of the file that hold it, of a model with or without adapters in it.

    model: any with the configuration; a skeleton of its class is made for the names.
    """
    skeleton = build_meta_model(deepcopy(model.config), torch.float32, "auto", torch.device("cpu"))
    result: dict[str, list[Placement]] = {}
    for place in placements(architecture, skeleton):
        for source in place.sources:
            result.setdefault(source, []).append(place)
    return result
