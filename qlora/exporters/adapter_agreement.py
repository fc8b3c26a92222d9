"""KL between a trained adapter and the LoRA that approximates it, both on the base they were trained on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qlora.adapters.attach import build_layers
from qlora.adapters.peft_files import read
from qlora.adapters.switch import AdapterSwitch
from qlora.data.types import Example
from qlora.exporters.certificate import Agreement, compare
from qlora.runs.load_run import LoadedRun


def compare_adapters(run: LoadedRun, folder: Path, examples: Sequence[Example]) -> Agreement:
    """Compare the trained adapter with the one in `folder`, example by example."""
    assert run.adapter is not None
    model, device = run.base.model, run.base.device
    switch = AdapterSwitch(model)
    for name, file in (("trained", run.adapter), ("written", read(folder))):
        switch.add(name, build_layers(model, file, run.base.manifest.sha256, allow_other_base=True)[0])
    trained, written = (ModelWithAdapter(model, switch, name) for name in ("trained", "written"))
    return compare(trained, written, examples, device)


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
