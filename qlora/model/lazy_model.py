"""A written model whose matrices stay on disk: each is read when it is used, so that a model of any size can run."""

from pathlib import Path

import torch
from torch import Tensor, nn

from qlora.errors import BaseModelError
from qlora.model.buffers import persistent_buffers
from qlora.model.dtypes import loaded_dtype
from qlora.model.linear_layers import linear_paths
from qlora.model.meta_model import build_meta_model, names_by_key, read_config
from qlora.model.module_tree import set_by_path
from qlora.model.rotary import replace_length_dependent_rotary
from qlora.model.safetensors_reader import SafetensorsReader
from qlora.model.tensor_checks import check_complete
from qlora.quant.linear import FrozenLinear, check_matrix


class OnDiskLinear(FrozenLinear):
    """y = x W^T + bias with W [O, I] read from its file on each use."""

    def __init__(self, reader: SafetensorsReader, key: str, device: torch.device, bias: Tensor | None) -> None:
        out_features, in_features = reader.shape(key)
        super().__init__(out_features, in_features, bias)
        self._reader, self._key, self._device = reader, key, device

    def weight(self, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
        """W [O, I] in `dtype`, read from the file. BaseModelError if it is damaged or not finite."""
        stored = self._reader[self._key].to(self._device)
        check_matrix(stored)
        return stored.to(dtype)


def load_lazy_model(
    folder: Path, dtype: torch.dtype, attention: str, device: torch.device, share_with: nn.Module | None = None
) -> nn.Module:
    """The dense model of a folder on `device`, in evaluation mode; only the decoder's linear weights stay on disk.

    A parameter that `share_with` has with equal values (embedding, head) is shared with it and may be on its device.
    BaseModelError if a tensor is missing or its shape differs from config.json.
    """
    shared = dict(share_with.named_parameters()) if share_with else {}
    model = build_meta_model(read_config(folder), dtype, attention, device)
    reader = SafetensorsReader(folder)
    linears, tied = set(linear_paths(model)), set(model.all_tied_weights_keys)  # type: ignore[arg-type]
    keys = {name: key for key, name in names_by_key(model, folder, reader).items()}
    buffers = persistent_buffers(model)
    for name, tensor in [*model.named_parameters(), *buffers.items()]:
        path, _, leaf = name.rpartition(".")
        if name in tied or (path in linears and leaf == "bias") or (name in buffers and name not in keys):
            continue
        key, held = _key_of(name, keys, tensor, reader), loaded_dtype(model, name, tensor, dtype)
        if path in linears:
            bias = model.get_submodule(path).bias
            if isinstance(bias, Tensor):
                bias = reader[_key_of(f"{path}.bias", keys, bias, reader)].to(device, dtype, copy=True)
            set_by_path(model, path, OnDiskLinear(reader, key, device, bias))  # type: ignore[arg-type]  # a tensor or None
        elif name in buffers:
            set_by_path(model, name, reader[key].to(device, held, copy=True))
        else:
            set_by_path(model, name, _shared_or_new(reader[key].to(held), shared.get(name), device))
    model.tie_weights()  # type: ignore[operator]
    replace_length_dependent_rotary(model)
    check_complete(folder, model)
    return model


def _shared_or_new(values: Tensor, other: nn.Parameter | None, device: torch.device) -> nn.Parameter:
    """`other` if it holds exactly `values`, else a new parameter on `device`."""
    if other is not None and other.dtype == values.dtype and torch.equal(other.detach().cpu(), values):
        return other
    return nn.Parameter(values.to(device, copy=True), requires_grad=False)


def _key_of(name: str, keys: dict[str, str], expected: Tensor, reader: SafetensorsReader) -> str:
    """The checkpoint key of a parameter. BaseModelError unless it exists with the shape of `expected`."""
    key = keys.get(name)
    if key is None or reader.shape(key) != tuple(expected.shape):
        actual = "nothing" if key is None else list(reader.shape(key))
        raise BaseModelError(f"model: {reader.folder}: {name} should be {list(expected.shape)}, found {actual}.")
    return key
