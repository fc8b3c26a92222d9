"""The merged model: what was trained on, plus the update, as one plain transformers folder, written tensor by tensor.

The default base is the dequantised one that training saw. Sums are float32 and rounded once. Only tensors that the run
quantised are round-tripped; embeddings, norms and the head are copied.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.adapters.dora import magnified
from qlora.adapters.peft_files import settings
from qlora.errors import InputError
from qlora.exporters.export_source import ExportOptions, ExportSource, write_tokenizer
from qlora.model.bnb_checkpoint import companions, is_prequantized, read
from qlora.model.hf_config import grown, merged_config, untied
from qlora.model.meta_model import build, read_config, renamer
from qlora.model.safetensors_reader import Shards
from qlora.model.safetensors_writer import Planned, write_model
from qlora.quant.linear import FrozenLinear
from qlora.utils.atomic_files import write_bytes, write_json

CHUNK = 2**22  # values of a matrix that are summed and rounded at a time: 16 MiB each of update, sum and error


class MergedExporter:
    """Export target `merged`."""

    def write(self, trained: ExportSource, folder: Path, choice: ExportOptions) -> int:
        """Write the folder that transformers and the servers load; returns the bytes of its tensors.

        InputError if the original 16-bit weights are asked for and the base was stored in 4 bits.
        """
        merge = _Merge(trained, choice)
        tensors = list(merge.planned())
        size = write_model(folder, tensors, report=choice.report, notes=choice.rounding)
        write_tokenizer(trained, folder)
        generation = trained.base / "generation_config.json"
        if generation.is_file():
            write_bytes(folder / generation.name, generation.read_bytes())
        config = merged_config(trained.base / "config.json", choice.dtype)
        rows = max((int(index.max()) + 1 for index, _ in trained.rows.values()), default=0)
        write_json(folder / "config.json", grown(untied(config) if merge.heads else config, rows))
        return size


@dataclass(frozen=True)
class _Merge:
    """One pass over the base's keys: which are copied, which are merged, and how."""

    trained: ExportSource
    choice: ExportOptions
    heads: list[str] = field(default_factory=list)  # tied in the base, and no longer one tensor

    def planned(self) -> Iterator[Planned]:
        """Every tensor of the merged model, in the order of the base's files."""
        trained, onto = self.trained, self.choice.onto
        made = trained.adapter.pairs.keys() | (trained.quantized.keys() if onto == "dequantized" else set())
        shards = Shards(trained.base)
        skeleton = build(read_config(trained.base), trained.compute, "auto", torch.device("cpu"))
        rename, modules = renamer(skeleton, trained.base), trained.adapter.modules
        tied: dict[str, str] = dict(skeleton.all_tied_weights_keys)  # type: ignore[arg-type]
        packed = {key for key in shards if is_prequantized(key, shards)}
        parts = {part for key in packed for part in companions(key)}
        if packed and onto == "original":
            raise InputError(
                "--base original: this base is stored in 4 bits, there are no 16-bit weights. Use dequantized."
            )
        for key in shards:
            name = rename(key)
            if key in parts or name in tied:
                continue
            path = name.removesuffix(".weight")
            if name in modules:
                yield self._trained(key, modules[name])
            elif path in trained.rows:
                yield self._with_rows(shards, key, path)
            elif key in packed or path in made:
                yield self._matrix(shards, key, path, _shape_of(skeleton, path))
            else:
                yield self._copied(shards, key)
            for head in (head for head, source in tied.items() if source == name):
                yield from self._untied(shards, key, head, name)

    def _untied(self, shards: Shards, key: str, head: str, source: str) -> Iterator[Planned]:
        """A head that was the embedding, where training has made them two."""
        modules = self.trained.adapter.modules
        if not modules.keys() & {head, source}:
            return
        values = [modules.get(name, None) for name in (head, source)]
        known = [shards[key].float() if value is None else value.float() for value in values]
        if not torch.equal(*known):
            self.heads.append(head)
            yield self._copied(shards, key, head) if values[0] is None else self._trained(head, values[0])

    def _with_rows(self, shards: Shards, key: str, path: str) -> Planned:
        """An embedding or a head with the rows that trained in their places."""
        index, rows = self.trained.rows[path]

        def make() -> Tensor:
            found = self._rounded(shards[key])
            added = found.new_zeros(shape[0] - len(found), shape[1])  # every one of them is among the rows that trained
            return torch.cat([found, added]).index_copy_(0, index, rows.to(self.trained.compute))

        height, width = shards.shape(key)
        shape = (max(height, int(index.max()) + 1), width)
        return Planned(key, shape, self.choice.dtype, make)

    def _trained(self, key: str, values: Tensor) -> Planned:
        """A module that trained whole, as the trained model read it."""
        return Planned(key, tuple(values.shape), self.choice.dtype, lambda: self._rounded(values))

    def _copied(self, shards: Shards, key: str, name: str | None = None) -> Planned:
        dtype = self.choice.dtype if shards.is_float(key) else shards[key].dtype
        # Through the compute dtype first: that is what the trained model read.
        return Planned(name or key, shards.shape(key), dtype, lambda: self._rounded(shards[key]))

    def _rounded(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.trained.compute) if tensor.is_floating_point() else tensor

    def _matrix(self, shards: Shards, key: str, path: str, shape: tuple[int, ...]) -> Planned:
        return Planned(key, shape, self.choice.dtype, lambda: self._summed(self._base_weight(shards, key), path))

    def _summed(self, weight: Tensor, path: str) -> Tensor:
        """W + s B A [O, I], summed in float32 a few rows at a time and rounded once; what rounding took is noted.

        DoRA's rows are then brought to their length.
        """
        adapter, device = self.trained.adapter, self.trained.device
        if path not in adapter.pairs:
            return weight
        a, b = (side.to(device, torch.float32) for side in adapter.pairs[path])
        magnitude = adapter.magnitudes[path].to(device, torch.float32) if path in adapter.magnitudes else None
        scaling = settings(adapter, path, a.shape[0]).scaling
        written = torch.empty(weight.shape, dtype=self.choice.dtype, device=weight.device)
        error, size = 0.0, 0.0
        for rows in torch.arange(len(weight), device=weight.device).split(max(1, CHUNK // a.shape[1])):
            here = slice(int(rows[0]), int(rows[-1]) + 1)
            update = scaling * (b[here] @ a)
            if magnitude is not None:
                update = magnified(weight[here] + update, magnitude[here]) - weight[here]
            exact = weight[here].add_(update)
            written[here] = exact
            error += float(exact.sub_(written[here]).square().sum(dtype=torch.float64))
            size += float(update.square_().sum(dtype=torch.float64))
        self.choice.rounding[path] = {"error": error**0.5, "update": size**0.5}
        return written

    def _base_weight(self, shards: Shards, key: str) -> Tensor:
        """The matrix that the update is added to, [O, I] in float32, not shared with anything."""
        if is_prequantized(key, shards):
            return read(key, shards.__getitem__, shards, None).to(self.trained.device).weight(torch.float32)
        weight = shards[key].to(self.trained.device, self.trained.compute)
        if self.choice.onto == "original":
            return weight.to(torch.float32, copy=True)
        layer: FrozenLinear = self.trained.quantizer.quantize(weight, None)
        rebuilt = layer.weight(torch.float32)
        # A dense layer gives its own tensor; a copy of any other would double the peak.
        own = any(rebuilt.data_ptr() == stored.data_ptr() for stored in layer.parameters())
        return rebuilt.clone() if own else rebuilt


def _shape_of(skeleton: Any, path: str) -> tuple[int, ...]:
    return tuple(skeleton.get_submodule(path).weight.shape)
