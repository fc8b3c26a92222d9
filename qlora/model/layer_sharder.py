"""FSDP sharding while loading: each decoder layer is sharded as soon as all its tensors are loaded."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

from qlora.distributed.processes import Processes
from qlora.model.lean_modules import replace_with_lean
from qlora.model.module_tree import LAYER, decoder_of, unit_path
from qlora.quant.linear import FrozenLinear


class LayerSharder:
    """Shards a model unit by unit (decoder layer, untied embedding, head), so that no rank ever holds all of it."""

    def __init__(self, model: nn.Module, processes: Processes, on_host: Callable[[str], bool]) -> None:
        self.model, self.processes, self.on_host = model, processes, on_host
        self._lean_checks: dict[type, bool] = {}
        self._pending: dict[str, nn.Module] = {}
        tied: Any = model.all_tied_weights_keys
        for path, module in model.named_modules():
            is_untied_end = module in self._ends() and not tied
            if processes.shards and (LAYER.fullmatch(path) or is_untied_end):
                self._pending[path] = module

    def shard_complete(self, names: Iterable[str]) -> None:
        """Shard the units that have all their tensors, after the parameters `names` were loaded on every rank."""
        for path in sorted({path for name in names for path in (unit_path(name), name.rpartition(".")[0])}):
            module = self._pending.get(path)
            if module is None or any(parameter.is_meta for parameter in module.parameters()):
                continue
            del self._pending[path]
            replace_with_lean(module, self._lean_checks)
            self._shard(path, module)

    def shard_rest(self) -> None:
        """Shard what is outside the layers. A tied embedding and head are not sharded: both ends of a step use them."""
        if not self.processes.shards:
            return
        decoder: nn.Module = decoder_of(self.model)
        ends = {id(value) for end in self._ends() for value in end.parameters()}
        unsharded = [value for value in decoder.parameters() if id(value) in ends and not hasattr(value, "to_local")]
        self.processes.shard(decoder, ignored=unsharded)

    def _shard(self, path: str, module: nn.Module) -> None:
        # The head is used chunk by chunk: it stays unsharded until the loss is known.
        self.processes.shard(module, keep_unsharded=module is self._ends()[-1], offload=self.on_host(f"{path}."))
        for layer in module.modules():
            if isinstance(layer, FrozenLinear):
                layer.fetch, layer.compute_device = (
                    partial(self.processes.unshard, module, layer),
                    self.processes.device,
                )

    def _ends(self) -> tuple[nn.Module, nn.Module]:
        """Embedding and head."""
        model: Any = self.model
        return model.get_input_embeddings(), model.get_output_embeddings()
