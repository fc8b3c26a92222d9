"""KL between a trained model and what others compute: a LoRA that approximates its adapter, or the 16-bit base."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from qlora.adapters.attach import attach, build_layers
from qlora.adapters.peft_files import AdapterFile, read
from qlora.adapters.switch import AdapterSwitch
from qlora.data.types import Example
from qlora.exporters.certificate import Agreement, compare
from qlora.exporters.mlx import WEIGHTS as MLX_WEIGHTS
from qlora.exporters.mlx import read_mlx
from qlora.memory.weight_streaming import embed_on_host
from qlora.model.bnb_checkpoint import is_prequantized
from qlora.model.dtypes import stored_dtype
from qlora.model.lazy_model import load_lazy_model
from qlora.model.open_checkpoint import open_checkpoint
from qlora.runs.foreign_adapter import fit_to
from qlora.runs.load_run import LoadedRun
from qlora.utils.devices import same_device


def compare_adapters(run: LoadedRun, folder: Path, examples: Sequence[Example]) -> Agreement:
    """Compare the trained adapter with the one in `folder`, example by example."""
    assert run.adapter is not None
    model, device = run.base.model, run.base.device
    switch = AdapterSwitch(model)
    written_file = fit_to(run.base, read_written(folder), lambda line: None)  # its names may be those of another class
    for name, file in (("trained", run.adapter), ("written", written_file)):
        switch.add(name, build_layers(model, file, run.base.manifest.sha256, allow_other_base=True)[0])
    trained, written = (ModelWithAdapter(model, switch, name) for name in ("trained", "written"))
    return compare(trained, written, examples, device)


def has_16_bit_base(run: LoadedRun) -> bool:
    """Whether the base's files hold 16-bit weights, and not 4-bit ones of bitsandbytes."""
    reader = open_checkpoint(run.base.folder.path)
    return not any(is_prequantized(key, reader) for key in reader)


def compare_on_16_bit_base(run: LoadedRun, folder: Path, examples: Sequence[Example]) -> Agreement:
    """Compare the trained model with the base's unquantized weights plus the adapter in `folder`, as servers compute.

    The weights are read from the base's files when they are used.
    """
    trained, base = run.base.model, run.base
    dtype, attention = stored_dtype(base.dtype), run.recipe.model.attention
    served = load_lazy_model(base.folder.path, dtype, attention, base.device, share_with=trained)
    if not same_device(trained.get_input_embeddings().weight.device, base.device):  # type: ignore[operator]
        embed_on_host(served, base.device)
    file = fit_to(replace(base, model=served), read_written(folder), lambda line: None)
    attach(served, file, base.manifest.sha256)
    return compare(trained, served, examples, base.device)


def read_written(folder: Path) -> AdapterFile:
    """The adapter of an export, in PEFT's format or mlx-lm's."""
    return read_mlx(folder) if (folder / MLX_WEIGHTS).is_file() else read(folder)


class ModelWithAdapter(nn.Module):
    """A view of a model in which one adapter is active, for `compare`."""

    def __init__(self, model: nn.Module, switch: AdapterSwitch, name: str) -> None:
        super().__init__()
        self._shared = (model, switch, name)  # a tuple: the model is not a submodule
        self.config = model.config

    @property
    def whole_model(self) -> nn.Module:
        """The model itself, whose class computes the logits."""
        return self._shared[0]

    def get_decoder(self) -> Callable[..., Any]:
        """The decoder; a call of it activates the adapter."""
        return _DecoderWithAdapter(*self._shared)

    def get_output_embeddings(self) -> nn.Module:
        """The head, which no LoRA changes."""
        return self._shared[0].get_output_embeddings()  # type: ignore[no-any-return, operator]


class _DecoderWithAdapter:
    """The decoder of a model, with one adapter active."""

    def __init__(self, model: Any, switch: AdapterSwitch, name: str) -> None:
        self._decoder, self._switch, self._name = model.get_decoder(), switch, name
        self.config = self._decoder.config

    def __call__(self, **inputs: Any) -> Any:
        self._switch.activate(self._name)
        return self._decoder(**inputs)
