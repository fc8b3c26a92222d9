"""The per-layer embedding of Gemma 3n and 4 in host memory: half of the weights, of which a step reads a few rows."""

from typing import Any

from torch import Tensor, nn

from qlora.model.module_tree import decoder_of

TABLE = "embed_tokens_per_layer"


class HostTable(nn.Module):
    """An embedding in host memory, whose rows are copied to the device of the ids; a move of the model leaves it."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self._table = [table.to("cpu")]  # in a list, so that it is no submodule: DDP and FSDP leave it alone too

    def forward(self, ids: Tensor) -> Tensor:
        """The rows [B, T, width] of ids [B, T]."""
        rows: Tensor = self._table[0](ids.to("cpu"))
        return rows.to(ids.device, non_blocking=True)


def keep_table_on_host(model: nn.Module) -> bool:
    """Move a decoder's per-layer embedding to host memory; False if it has none."""
    decoder: Any = decoder_of(model)
    table = getattr(decoder, TABLE, None)
    if not isinstance(table, nn.Embedding):
        return False
    setattr(decoder, TABLE, HostTable(table))
    return True
