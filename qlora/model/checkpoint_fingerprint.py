"""The fingerprint of a checkpoint without a model in memory: its tensors are read, hashed and dropped."""

from pathlib import Path

import torch

from qlora.model.meta_model import build_meta_model, read_config
from qlora.model.module_tree import set_tensor
from qlora.model.weight_loader import LoadTarget, WeightLoader
from qlora.quant import Quant, build_quantizer


def checkpoint_sha256(folder: Path) -> str:
    """What BaseManifest.sha256 is once the model in `folder` is loaded. BaseModelError as for loading it."""
    device = torch.device("cpu")
    model = build_meta_model(read_config(folder), torch.float32, "auto", device)
    target = LoadTarget(build_quantizer(Quant(kind="dense")), torch.float32, device)
    return _Hasher(model, folder, target).run(lambda done, total: None).sha256


class _Hasher(WeightLoader):
    """A loader whose tensors take no memory."""

    def _set(self, parameter, result) -> None:  # type: ignore[no-untyped-def]  # as in WeightLoader
        names = [parameter.name, *([parameter.bias.name] if parameter.bias else [])]
        for name in names:
            set_tensor(self.model, name, torch.zeros((), dtype=torch.bool).expand(self._shape(name)))
