"""How a LoRA that stands for another adapter answers beside it: both on the one base that they were trained on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qlora.adapters.switch import Switch
from qlora.adapters.weights import fitted, read
from qlora.data.types import Example
from qlora.export.certificate import Agreement, compare
from qlora.reopen import Opened


def as_lora(opened: Opened, folder: Path, examples: Sequence[Example]) -> Agreement:
    """The trained adapter against the one in `folder`, row by row; afterwards neither acts."""
    assert opened.adapter is not None
    model, device = opened.base.model, opened.base.device
    switch = Switch(model)
    for name, file in (("trained", opened.adapter), ("written", read(folder))):
        switch.hold(name, fitted(model, file, opened.base.manifest.sha256, allow_other_base=True)[0])
    return compare(Acting(model, switch, "trained"), Acting(model, switch, "written"), examples, device)


class Acting(nn.Module):
    """A model with one of its adapters switched on whenever it is called."""

    def __init__(self, model: nn.Module, switch: Switch, name: str) -> None:
        super().__init__()
        self._parts = (model, switch, name)  # in a tuple: the model belongs to somebody else

    def forward(self, **inputs: Any) -> Any:
        """As the model."""
        model, switch, name = self._parts
        switch.use(name)
        return model(**inputs)
