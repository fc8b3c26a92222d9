"""Facts about operators: which arguments they write, whether they launch a kernel, whether the host waits for them."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from support.pretended_gpu.storages import on_gpu

NO_KERNEL = {
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
    "aten::_unsafe_view", "aten::set_", "aten::resize_", "aten::_local_scalar_dense", "aten::lift_fresh",
    "aten::_reshape_alias", "aten::is_same_size", "aten::record_stream", "aten::_has_same_storage_numel",
}  # fmt: skip
WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::_linalg_svd", "aten::_linalg_eigh",
}  # fmt: skip
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
COPIES = {"aten::copy_", "aten::_to_copy"}
RAW_POINTERS = ("aten::_fused_adam",)  # also 0-dimensional tensors are read by the kernel itself


class OperatorFacts(NamedTuple):
    """What the schema of an operator says."""

    name: str
    written: tuple[int, ...]  # positions of the arguments that it writes
    written_names: tuple[str, ...]
    launches: bool


@cache
def facts_of(operator: Any) -> OperatorFacts:
    """The facts of an operator overload."""
    schema = operator._schema
    arguments = [(argument.name, argument.alias_info) for argument in schema.arguments]
    written = [index for index, (_, alias) in enumerate(arguments) if alias is not None and alias.is_write]
    names = tuple(arguments[index][0] for index in written)
    is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)
    return OperatorFacts(schema.name, tuple(written), names, not is_view and schema.name not in NO_KERNEL)


def tensors_in(*values: Any) -> list[Tensor]:
    """All tensors in arguments, nested lists included."""
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple):
            tensors += tensors_in(*value)
    return tensors


def written_tensors(facts: OperatorFacts, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes in place."""
    values = [args[index] for index in facts.written if index < len(args)]
    return tensors_in(*values, *(kwargs[name] for name in facts.written_names if name in kwargs))


def wait_reason(facts: OperatorFacts, args: Sequence[Any]) -> str | None:
    """Why the host waits for the GPU in an operator on its tensors; None if it does not."""
    if facts.name in WAITS or (facts.name == "aten::repeat_interleave" and len(args) == 1):
        return facts.name
    if facts.name in INDEXING:
        indices = tensors_in(args[1])
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return f"{facts.name} with a mask (nonzero)"
        if not all(on_gpu(index) for index in indices):
            return f"{facts.name} with indices in host memory"
    return None


def may_mix(facts: OperatorFacts, args: Sequence[Any]) -> bool:
    """Whether an operator takes tensors of both sides: copies, and indices in host memory for a tensor on the GPU."""
    if facts.name in INDEXING:
        values = tensors_in(*args[2:])
        return on_gpu(args[0]) and all(on_gpu(value) or value.dim() == 0 for value in values)
    return facts.name in COPIES
