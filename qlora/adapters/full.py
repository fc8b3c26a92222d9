"""Every weight trains: the baseline that low-rank updates are compared with. Float32 masters, the base's arithmetic."""

from dataclasses import dataclass

from torch import nn

from qlora.adapters.inject import Injection, replace
from qlora.adapters.master_weights import MasterNorm, master_of, trainable_modules
from qlora.errors import AdapterError


@dataclass(frozen=True)
class Full:
    """Settings of full fine-tuning: there are none of its own."""

    dropout: float = 0.0

    def train_all(self, model: nn.Module) -> Injection:
        """Put a master in the place of every matrix, norm and embedding of the decoder, and of the head.

        AdapterError if a matrix is stored in 4 bits, or some weight of the decoder is in no module known here.
        """
        paths, shared = [], dict[int, nn.Parameter]()
        for path, module in list(trainable_modules(model)):
            master = master_of(path, module, shared)
            if isinstance(master, MasterNorm):
                module._parameters.update(master._parameters)  # its arithmetic stays in use, its own weights go
            replace(model, path, master)
            paths.append(path)
        self._refuse_left(model)
        trainable = sum(value.numel() for value in model.parameters() if value.requires_grad)
        whole = sum(value.numel() for value in model.parameters())
        return Injection((), len(paths), trainable, whole, tuple(paths))

    def _refuse_left(self, model: nn.Module) -> None:
        decoder = model.get_decoder()  # type: ignore[operator]
        left = [name for name, value in decoder.named_parameters() if not value.requires_grad]
        if left:
            raise AdapterError(
                f"adapter.kind: full can't train {', '.join(left[:3])} of this architecture. Use lora, rslora or dora."
            )
