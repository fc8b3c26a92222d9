"""Search of a checkpoint for tensors that are stored in a released format."""

from qlora.errors import BaseModelError
from qlora.quant.released import FORMATS
from qlora.quant.released.released_tensor import ReleasedTensor, StoredFiles, is_companion, misfit
from qlora.quant.released.settings import QuantizationSettings


def find_released(files: StoredFiles, settings: QuantizationSettings) -> dict[str, ReleasedTensor]:
    """Decoded key -> tensor, of every tensor of a checkpoint that is stored in one of FORMATS.

    BaseModelError, naming the tensor, if its scales are missing or do not fit it.
    """
    formats, tensors = list(FORMATS.values()), dict[str, ReleasedTensor]()
    for key in files:
        candidates = () if is_companion(key) else (format.find(key, files, settings) for format in formats)
        tensor = next((candidate for candidate in candidates if candidate), None)
        if tensor is None:
            continue
        if 0 in tensor.shape:
            raise misfit(key, files.shape(key), "a matrix that is not empty")
        if tensor.key in tensors or (tensor.key in files and tensor.key not in tensor.parts.values()):
            raise BaseModelError(f"{tensor.key!r} is stored twice: also as {key!r}. Remove one of them.")
        tensors[tensor.key] = tensor
    return tensors
