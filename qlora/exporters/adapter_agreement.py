"""How a LoRA that stands for another adapter answers beside it: both on the one base that they were trained on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qlora.adapters.peft_files import fitted, read
from qlora.adapters.switch import AdapterSwitch
from qlora.data.types import Example
from qlora.exporters.certificate import Agreement, compare
from qlora.runs.load_run import LoadedRun


def as_lora(opened: LoadedRun, folder: Path, examples: Sequence[Example]) -> Agreement:
    """The trained adapter against the one in `folder`, row by row; afterwards neither acts."""
    assert opened.adapter is not None
    model, device = opened.base.model, opened.base.device
    switch = AdapterSwitch(model)
    for name, file in (("trained", opened.adapter), ("written", read(folder))):
        switch.hold(name, fitted(model, file, opened.base.manifest.sha256, allow_other_base=True)[0])
    return compare(Acting(model, switch, "trained"), Acting(model, switch, "written"), examples, device)


class Acting(nn.Module):
    """A model whose decoder runs with one of its adapters switched on, whatever acted before."""

    def __init__(self, model: nn.Module, switch: AdapterSwitch, name: str) -> None:
        super().__init__()
        self._parts = (model, switch, name)  # in a tuple: the model belongs to somebody else
        self.config = model.config

    def get_decoder(self) -> Callable[..., Any]:
        """The decoder; the adapter acts from its call on, until the other one's."""
        return _Decoder(*self._parts)

    def get_output_embeddings(self) -> nn.Module:
        """The head, which no LoRA changes."""
        return self._parts[0].get_output_embeddings()  # type: ignore[no-any-return, operator]


class _Decoder:
    """The decoder as one adapter makes it."""

    def __init__(self, model: Any, switch: AdapterSwitch, name: str) -> None:
        self._decoder, self._switch, self._name = model.get_decoder(), switch, name
        self.config = self._decoder.config

    def __call__(self, **inputs: Any) -> Any:
        self._switch.use(self._name)
        return self._decoder(**inputs)
