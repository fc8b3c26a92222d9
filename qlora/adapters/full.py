"""Full fine-tuning: every weight trains, as float32 master weights. The baseline for low-rank updates."""

from dataclasses import dataclass

from torch import nn

from qlora.adapters.inject import Injection
from qlora.adapters.master_weights import MasterNorm, trainable_copy, trainable_modules
from qlora.errors import AdapterError
from qlora.model.module_tree import decoder_of, set_by_path


@dataclass(frozen=True)
class Full:
    """Full fine-tuning has no settings; `dropout` is what run.json records."""

    dropout: float = 0.0

    def train_all(self, model: nn.Module) -> Injection:
        """Replace every matrix, norm and embedding of the decoder, and the head, by a trainable copy.

        AdapterError if a matrix is stored in 4 bits, or a weight of the decoder belongs to no trainable module.
        """
        paths, shared = [], dict[int, nn.Parameter]()
        for path, module in list(trainable_modules(model)):
            trainable = trainable_copy(path, module, shared)
            if isinstance(trainable, MasterNorm):
                module._parameters.update(trainable._parameters)  # its forward stays in use, its own weights are freed
            set_by_path(model, path, trainable)
            paths.append(path)
        self._refuse_frozen(model)
        trainable_parameters = sum(value.numel() for value in model.parameters() if value.requires_grad)
        parameters = sum(value.numel() for value in model.parameters())
        return Injection((), len(paths), trainable_parameters, parameters, tuple(paths))

    def _refuse_frozen(self, model: nn.Module) -> None:
        decoder = decoder_of(model)
        frozen = [name for name, value in decoder.named_parameters() if not value.requires_grad]
        if frozen:
            raise AdapterError(
                f"adapter.kind: full can't train {', '.join(frozen[:3])} of this architecture. Use another kind."
            )
