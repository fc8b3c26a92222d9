"""A written model whose matrices stay on disk: each is read when it is used, so that a model of any size can run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.errors import BaseModelError
from qlora.model.buffers import persistent_buffers
from qlora.model.checkpoint_reader import CheckpointReader
from qlora.model.dtypes import loaded_dtype
from qlora.model.layouts.checkpoint_layout import read_layout
from qlora.model.layouts.pieces import TensorSource
from qlora.model.linear_layers import linear_paths
from qlora.model.meta_model import build_meta_model, read_config
from qlora.model.module_tree import set_by_path
from qlora.model.open_checkpoint import open_checkpoint
from qlora.model.recurrent_mixers import isolate_recurrent_mixers
from qlora.model.rotary import replace_length_dependent_rotary
from qlora.model.tensor_checks import check_complete
from qlora.quant.linear import FrozenLinear, check_matrix


class OnDiskLinear(FrozenLinear):
    """y = x W^T + bias with W [O, I] read from its file on each use."""

    def __init__(
        self, reader: CheckpointReader, source: TensorSource, device: torch.device, bias: Tensor | None
    ) -> None:
        out_features, in_features = source.shape(reader)
        super().__init__(out_features, in_features, bias)
        self._reader, self._source, self.compute_device = reader, source, device

    def weight(self, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
        """W [O, I] in `dtype`, read from the file. BaseModelError if it is damaged or not finite."""
        stored = self._source.read(self._reader).to(self.device)
        check_matrix(stored)
        return stored.to(dtype)


def load_lazy_model(
    folder: Path, dtype: torch.dtype, attention: str, device: torch.device, share_with: nn.Module | None = None
) -> nn.Module:
    """The dense model of a folder on `device`, in evaluation mode; only the decoder's linear weights stay on disk.

    A parameter that `share_with` has with equal values (embedding, head) is shared with it and may be on its device.
    BaseModelError if a tensor is missing or its shape differs from config.json.
    """
    return build_lazy_model(read_config(folder), open_checkpoint(folder), dtype, attention, device, share_with)


def build_lazy_model(
    config: Any,
    reader: CheckpointReader,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
    share_with: nn.Module | None = None,
) -> nn.Module:
    """`load_lazy_model` for a configuration of transformers and the tensors of `reader`."""
    shared = dict(share_with.named_parameters()) if share_with else {}
    model = build_meta_model(config, dtype, attention, device)
    linears, tied = set(linear_paths(model)), set(model.all_tied_weights_keys)  # type: ignore[arg-type]
    sources = read_layout(model, reader).sources
    buffers = persistent_buffers(model)
    for name, tensor in [*model.named_parameters(), *buffers.items()]:
        path, _, leaf = name.rpartition(".")
        if name in tied or (path in linears and leaf == "bias") or (name in buffers and name not in sources):
            continue
        source, held = _source_of(name, sources, tensor, reader), loaded_dtype(model, name, tensor, dtype)
        if path in linears:
            bias = model.get_submodule(path).bias
            if isinstance(bias, Tensor):
                bias_source = _source_of(f"{path}.bias", sources, bias, reader)
                bias = bias_source.read(reader).to(device, dtype, copy=True)
            set_by_path(model, path, OnDiskLinear(reader, source, device, bias))  # type: ignore[arg-type]  # a tensor or None
        elif name in buffers:
            set_by_path(model, name, source.read(reader).to(device, held, copy=True))
        else:
            set_by_path(model, name, _shared_or_new(source.read(reader).to(held), shared.get(name), device))
    model.tie_weights()  # type: ignore[operator]
    replace_length_dependent_rotary(model)
    isolate_recurrent_mixers(model)
    check_complete(reader.folder, model)
    return model


def _shared_or_new(values: Tensor, other: nn.Parameter | None, device: torch.device) -> nn.Parameter:
    """`other` if it holds exactly `values`, else a new parameter on `device`."""
    if other is not None and other.dtype == values.dtype and torch.equal(other.detach().cpu(), values):
        return other
    return nn.Parameter(values.to(device, copy=True), requires_grad=False)


def _source_of(
    name: str, sources: Mapping[str, TensorSource], expected: Tensor, reader: CheckpointReader
) -> TensorSource:
    """The source of a parameter. BaseModelError unless it exists with the shape of `expected`."""
    source = sources.get(name)
    if source is None or source.shape(reader) != tuple(expected.shape):
        actual = "nothing" if source is None else list(source.shape(reader))
        raise BaseModelError(f"model: {reader.folder}: {name} should be {list(expected.shape)}, found {actual}.")
    return source
