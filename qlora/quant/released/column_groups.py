"""Groups of columns that share a scale where an index (`g_idx`) assigns them: activation order of GPTQ."""

from collections.abc import Mapping

import torch
from torch import Tensor

from qlora.errors import BaseModelError
from qlora.quant.released.released_tensor import ReleasedTensor, StoredFiles, check_shape


def groups_in_files(key: str, files: StoredFiles, columns: int) -> dict[str, str]:
    """The part `groups`, if the files hold an index under `key`. BaseModelError unless it has a group a column."""
    if key not in files:
        return {}
    check_shape(key, files, (columns,), "(a group for each input)")
    return {"groups": key}


def by_column(values: Tensor, index: Tensor | None, columns: int) -> Tensor:
    """Values of groups [N, G] as values of columns [N, I]; `index` as `group_index` returns it."""
    if index is None:
        return values.repeat_interleave(columns // values.shape[1], dim=1)
    return values.index_select(1, index)


def group_index(tensor: ReleasedTensor, tensors: Mapping[str, Tensor], groups: int) -> Tensor | None:
    """The group of each column, int64 [I]; None: equal groups in order. BaseModelError for one of no scale."""
    if "groups" not in tensors:
        return None
    index = tensors["groups"].long()
    in_order = torch.arange(len(index)) // max(1, len(index) // groups)
    if bool((index == -1).all()) or (len(index) % groups == 0 and torch.equal(index, in_order)):  # -1: never assigned
        return None
    if int(index.min()) < 0 or int(index.max()) >= groups:
        actual = f"{int(index.min())} to {int(index.max())}"
        raise BaseModelError(f"{tensor.parts['groups']!r} holds groups {actual}, expected 0 to {groups - 1}.")
    return index
