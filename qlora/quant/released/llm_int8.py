"""LLM.int8 of bitsandbytes: a byte a weight and a scale for each row. arXiv:2208.07339.

    X.weight         int8 [O, I]
    X.SCB            float32 [O], the largest magnitude of the row
    X.weight_format  uint8: 0, row-major; missing: the same

W = code * SCB / 127.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qlora.errors import BaseModelError
from qlora.quant.released.released_tensor import (
    FLOATS,
    ReleasedTensor,
    Rows,
    StoredFiles,
    check_dtypes,
    check_shape,
    misfit,
)
from qlora.quant.released.settings import QuantizationSettings

RECIPROCAL = 7.874015718698502e-3  # of 127, as bitsandbytes multiplies


@dataclass(frozen=True)
class LlmInt8(ReleasedTensor):
    """Codes are signed integers."""

    kind: ClassVar[str] = "llm_int8"

    @classmethod
    def find(cls, key: str, files: StoredFiles, settings: QuantizationSettings) -> "LlmInt8 | None":
        """Bytes with `SCB` beside them."""
        scale = f"{key.removesuffix('weight')}SCB"
        if not key.endswith(".weight") or files.dtype(key) != "I8" or scale not in files:
            return None
        shape, layout = files.shape(key), f"{key}_format"
        if len(shape) != 2:
            raise misfit(key, shape, "[out, in]")
        check_dtypes([scale], files, FLOATS)
        check_shape(scale, files, shape[:1], f"(a scale for each row of {key!r})")
        check_dtypes([name for name in (layout,) if name in files], files, ("U8",))
        if layout in files and bool(files[layout].any()):
            raise BaseModelError(f"{layout!r} is {files[layout].tolist()}, expected 0: row-major.")
        return cls(key, {"codes": key, "scale": scale}, None, (shape[0], shape[1]))

    def rows(self, tensors: Mapping[str, Tensor]) -> Rows:
        """In float32, in bitsandbytes' order."""
        codes, scale = tensors["codes"], self.finite("scale", tensors["scale"]).unsqueeze(1)
        return lambda part: codes[part].float() * scale[part] * RECIPROCAL
