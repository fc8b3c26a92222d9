"""A written model whose matrices stay in its files: each is read when it is used, so that any size can be measured."""

from pathlib import Path

import torch
from torch import Tensor, nn

from qlora.errors import BaseModelError
from qlora.model.meta_model import build, linear_paths, read_config, renamer
from qlora.model.module_tree import put
from qlora.model.safetensors_reader import Shards
from qlora.quant.linear import FrozenLinear, check_matrix


class FiledLinear(FrozenLinear):
    """y = x W^T + bias with W [O, I] in a file."""

    def __init__(self, shards: Shards, key: str, device: torch.device, bias: Tensor | None) -> None:
        out_features, in_features = shards.shape(key)
        super().__init__(out_features, in_features, bias)
        self._shards, self._key, self._device = shards, key, device

    def weight(self, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
        """W [O, I] in `dtype`, read anew. BaseModelError if it is damaged or not finite."""
        found = self._shards[self._key].to(self._device)
        check_matrix(found)
        return found.to(dtype)


def model_in_files(
    folder: Path, dtype: torch.dtype, attention: str, device: torch.device, beside: nn.Module | None = None
) -> nn.Module:
    """The dense model of a folder on `device`, in evaluation mode, all but its decoder's linear weights read.

    What `beside` has with the very same values (an embedding, a head) is shared with it, wherever it is there.
    BaseModelError if a tensor is missing or has another shape than config.json says.
    """
    known = dict(beside.named_parameters()) if beside else {}
    model = build(read_config(folder), dtype, attention, device)
    shards, rename = Shards(folder), renamer(model, folder)
    linears, tied = set(linear_paths(model)), set(model.all_tied_weights_keys)  # type: ignore[arg-type]
    places = {rename(key): key for key in shards}
    for name, parameter in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        if name in tied or (path in linears and leaf == "bias"):
            continue
        key = _present(places, name, parameter, shards)
        if path in linears:
            bias = model.get_submodule(path).bias
            if isinstance(bias, Tensor):
                bias = shards[_present(places, f"{path}.bias", bias, shards)].to(device, dtype, copy=True)
            put(model, path, FiledLinear(shards, key, device, bias))  # type: ignore[arg-type]  # a tensor or None
        else:
            put(model, name, _shared(shards[key].to(dtype), known.get(name), device))
    model.tie_weights()  # type: ignore[operator]
    return model


def _shared(read: Tensor, other: nn.Parameter | None, device: torch.device) -> nn.Parameter:
    """`other`, if it holds exactly what was read, else what was read."""
    if other is not None and other.dtype == read.dtype and torch.equal(other.detach().cpu(), read):
        return other
    return nn.Parameter(read.to(device, copy=True), requires_grad=False)


def _present(places: dict[str, str], name: str, expected: Tensor, shards: Shards) -> str:
    """The key of a parameter in the files, which must have its shape."""
    key = places.get(name)
    if key is None or shards.shape(key) != tuple(expected.shape):
        found = "nothing" if key is None else list(shards.shape(key))
        raise BaseModelError(f"model: {shards.folder}: {name} should be {list(expected.shape)}, found {found}.")
    return key
