"""Export target `merged`: the base that was trained on plus the update, as one transformers folder, tensor by tensor.

The default base is the dequantized one that training used. Sums are float32 and rounded once. Only tensors that the run
quantized are dequantized; embeddings, norms and the head are copied.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qlora._version import __version__
from qlora.adapters.dora import scale_rows
from qlora.adapters.peft_config import module_settings
from qlora.errors import InputError
from qlora.exporters import MERGE_BASE
from qlora.exporters.export_source import ExportOptions, ExportSource
from qlora.memory.planner.export_and_disk import MERGE_CHUNK_VALUES
from qlora.model.bnb_checkpoint import companion_keys, is_prequantized, read_4bit_layer
from qlora.model.buffers import tensors_of_other_dtype
from qlora.model.checkpoint_reader import CheckpointReader
from qlora.model.hf_config import merged_config, with_untied_head, with_vocab_size, write_config
from qlora.model.layouts.checkpoint_layout import read_layout
from qlora.model.layouts.pieces import TensorSource, assemble
from qlora.model.meta_model import build_meta_model, read_config, unties_head
from qlora.model.model_folder import EXPORT_MARK
from qlora.model.module_tree import tensor_of
from qlora.model.open_checkpoint import open_checkpoint
from qlora.model.safetensors_writer import PlannedTensor, write_model
from qlora.quant import quantizer_at
from qlora.quant.linear import FrozenLinear


class MergedExporter:
    """Writes one model."""

    def write(self, source: ExportSource, folder: Path, options: ExportOptions) -> int:
        """Write the folder that transformers and the servers load; returns the bytes of its tensors.

        InputError if the original 16-bit weights are requested and the base is stored in 4 bits.
        """
        merge = _Merge(source, options)
        tensors = list(merge.plan())
        size = write_model(
            folder, tensors, report=options.report, notes=options.rounding, mark={EXPORT_MARK: __version__}
        )
        source.write_tokenizer(folder)
        config = merged_config(source.base_folder / "config.json", options.dtype)
        if merge.untied_heads or unties_head(source.base_folder):
            config = with_untied_head(config)
        rows = len(source.model.get_input_embeddings().weight)  # type: ignore[operator]
        if rows != read_config(source.base_folder).get_text_config().vocab_size:
            config = with_vocab_size(config, rows)
        write_config(folder, config, source.base_folder)
        return size


def plan_merged(source: ExportSource, options: ExportOptions) -> list[PlannedTensor]:
    """Every tensor of the merged model, under the base's keys; it is computed when it is made."""
    return list(_Merge(source, options).plan())


@dataclass(frozen=True)
class _Merge:
    """Decides for every key of the base's files whether it is copied or merged, and how."""

    source: ExportSource
    options: ExportOptions
    untied_heads: list[str] = field(default_factory=list)  # tied in the base, but trained to differ

    def plan(self) -> Iterator[PlannedTensor]:
        """Every tensor of the merged model, in the order of the base's files."""
        source = self.source
        reader = open_checkpoint(source.base_folder)
        skeleton = build_meta_model(read_config(source.base_folder), source.compute_dtype, "auto", torch.device("cpu"))
        packed = {key for key in reader if is_prequantized(key, reader)}
        companions = {companion for key in packed for companion in companion_keys(key)}
        if packed and self.options.base != MERGE_BASE:
            raise InputError(
                "--base original: this base is stored in 4 bits and has no 16-bit weights. Use --base dequantized."
            )
        tied: dict[str, str] = dict(skeleton.all_tied_weights_keys)  # type: ignore[arg-type]
        layout = read_layout(skeleton, reader, companions)
        ignored = set(layout.ignored)
        merged_paths, other_dtypes = self._merged_paths(), tensors_of_other_dtype(skeleton, source.compute_dtype)
        for key in (key for key in reader if key not in companions):
            if key in ignored:
                yield PlannedTensor(key, reader.shape(key), reader[key].dtype, partial(reader.__getitem__, key))
            sources = layout.by_key.get(key, [])  # none of a tied head that is stored as well
            if len(sources) == 1 and sources[0].is_whole:
                name = sources[0].name
                shape = tuple(tensor_of(skeleton, name).shape)
                yield self._whole_tensor(reader, sources[0], shape, merged_paths, other_dtypes.get(name))
                for head in (head for head, embedding in tied.items() if embedding == name):
                    yield from self._untied_head(reader, key, head, name)
            elif sources:
                yield self._assembled_tensor(reader, key, sources, merged_paths)

    def _whole_tensor(
        self,
        reader: CheckpointReader,
        source: TensorSource,
        shape: tuple[int, ...],
        merged_paths: set[str],
        dtype: torch.dtype | None,
    ) -> PlannedTensor:
        """A tensor that is one tensor of the model, there of `shape`."""
        key, modules, path = source.key, self.source.adapter.modules, source.name.removesuffix(".weight")
        if source.name in modules:
            return self._trained_tensor(key, modules[source.name])
        if path in self.source.rows:
            return self._tensor_with_rows(reader, key, path)
        if path in merged_paths or is_prequantized(key, reader):
            return self._merged_matrix(reader, source, path, shape)
        return self._copied_tensor(reader, key, dtype=dtype)

    def _assembled_tensor(
        self, reader: CheckpointReader, key: str, sources: Sequence[TensorSource], merged_paths: set[str]
    ) -> PlannedTensor:
        """A tensor that holds parts of several matrices, such as a stack of experts, or a part of one."""
        if not any(source.name.removesuffix(".weight") in merged_paths for source in sources):
            return self._copied_tensor(reader, key)
        by_name = {source.name: source for source in sources}

        def values(name: str) -> Tensor:
            path = name.removesuffix(".weight")
            if path in merged_paths:
                return self._merge(self._base_weight(reader, by_name[name]), path)
            return self._in_compute_dtype(by_name[name].read(reader))

        return PlannedTensor(key, reader.shape(key), self.options.dtype, lambda: assemble(key, sources, values, reader))

    def _merged_paths(self) -> set[str]:
        """Paths of matrices that are not copied: those with an update, and those that are dequantized."""
        adapted = set(self.source.adapter.pairs)
        return adapted | set(self.source.quantized) if self.options.base == MERGE_BASE else adapted

    def _untied_head(self, reader: CheckpointReader, key: str, head: str, embedding: str) -> Iterator[PlannedTensor]:
        """A head that was tied to the embedding, if training has made them differ."""
        modules = self.source.adapter.modules
        if not modules.keys() & {head, embedding}:
            return
        trained = [modules.get(name, None) for name in (head, embedding)]
        values = [reader[key].float() if value is None else value.float() for value in trained]
        if not torch.equal(*values):
            self.untied_heads.append(head)
            yield (
                self._copied_tensor(reader, key, head) if trained[0] is None else self._trained_tensor(head, trained[0])
            )

    def _tensor_with_rows(self, reader: CheckpointReader, key: str, path: str) -> PlannedTensor:
        """An embedding or a head with its trained rows."""
        index, rows = self.source.rows[path]
        height, width = reader.shape(key)
        shape = (max(height, int(index.max()) + 1), width)

        def make() -> Tensor:
            weight = self._in_compute_dtype(reader[key])
            added = weight.new_zeros(shape[0] - len(weight), shape[1])  # all of them are among the trained rows
            return torch.cat([weight, added]).index_copy_(0, index, rows.to(self.source.compute_dtype))

        return PlannedTensor(key, shape, self.options.dtype, make)

    def _trained_tensor(self, key: str, values: Tensor) -> PlannedTensor:
        """A weight of a module to save, as the trained model used it."""
        return PlannedTensor(key, tuple(values.shape), self.options.dtype, lambda: self._in_compute_dtype(values))

    def _copied_tensor(
        self, reader: CheckpointReader, key: str, name: str | None = None, dtype: torch.dtype | None = None
    ) -> PlannedTensor:
        """A tensor of the base. `dtype`: in which its class holds it, if that is not the compute dtype."""
        if not reader.is_float(key):
            return PlannedTensor(name or key, reader.shape(key), reader[key].dtype, lambda: reader[key])
        if dtype is not None:
            return PlannedTensor(name or key, reader.shape(key), dtype, lambda: reader[key].to(dtype))
        # Through the compute dtype first: that is what the trained model used.
        make = lambda: self._in_compute_dtype(reader[key])  # noqa: E731
        return PlannedTensor(name or key, reader.shape(key), self.options.dtype, make)

    def _in_compute_dtype(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.source.compute_dtype) if tensor.is_floating_point() else tensor

    def _merged_matrix(
        self, reader: CheckpointReader, source: TensorSource, path: str, shape: tuple[int, ...]
    ) -> PlannedTensor:
        make = lambda: self._merge(self._base_weight(reader, source), path)  # noqa: E731
        return PlannedTensor(source.key, shape, self.options.dtype, make)

    def _merge(self, weight: Tensor, path: str) -> Tensor:
        """W + s B A [O, I], summed in float32 a few rows at a time and rounded once; records the rounding error.

        For DoRA the rows of the sum are scaled to their magnitudes.
        """
        adapter, device = self.source.adapter, self.source.device
        if path not in adapter.pairs:
            return weight
        a, b = (side.to(device, torch.float32) for side in adapter.pairs[path])
        magnitude = adapter.magnitudes[path].to(device, torch.float32) if path in adapter.magnitudes else None
        scaling = module_settings(adapter.config, path, a.shape[0]).scaling
        written = torch.empty(weight.shape, dtype=self.options.dtype, device=weight.device)
        error, size = 0.0, 0.0
        for rows in torch.arange(len(weight), device=weight.device).split(max(1, MERGE_CHUNK_VALUES // a.shape[1])):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            update = scaling * (b[part] @ a)
            if magnitude is not None:
                update = scale_rows(weight[part] + update, magnitude[part]) - weight[part]
            exact = weight[part].add_(update)
            written[part] = exact
            error += float(exact.sub_(written[part]).square().sum(dtype=torch.float64))
            size += float(update.square_().sum(dtype=torch.float64))
        self.options.rounding[path] = {"error": error**0.5, "update": size**0.5}
        return written

    def _base_weight(self, reader: CheckpointReader, source: TensorSource) -> Tensor:
        """The matrix that the update is added to, [O, I] in float32, in memory of its own."""
        if is_prequantized(source.key, reader):
            layer = read_4bit_layer(source.key, reader.__getitem__, reader, None)
            return layer.to(self.source.device).weight(torch.float32)
        weight = source.read(reader).to(self.source.device, self.source.compute_dtype)
        if self.options.base != MERGE_BASE:
            return weight.to(torch.float32, copy=True)
        quantizer = quantizer_at(self.source.quantizer, source.name.removesuffix(".weight"))
        frozen: FrozenLinear = quantizer.quantize(weight, None)
        dequantized = frozen.weight(torch.float32)
        # A dense layer returns its stored tensor, which must not change; a copy of any other would double the peak.
        shared = any(dequantized.data_ptr() == stored.data_ptr() for stored in frozen.parameters())
        return dequantized.clone() if shared else dequantized
