"""The workload of one rank in plain values: base model, quantizer, trained parameters, batch, policy of the layers."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from qlora.memory.planner.kept_bytes import KeptBytes
from qlora.memory.planner.shapes import Attention, Layer, Matrix, Shapes
from qlora.model.logits_chunk import LOGITS_CHUNK_BYTES
from qlora.quant import Quantizer

Weights = Literal["resident", "stream"]


@dataclass(frozen=True)
class AdapterSizes:
    """The parameters that train: float32 A [R, I] and B [O, R] of each of `matrices`, and modules to save."""

    matrices: tuple[Matrix, ...]
    kind: str
    rank: int
    dropout: bool
    keeps_init: bool = False  # the initial A and B are stored too (pissa)
    ranks: Mapping[str, int] = field(default_factory=dict)  # path -> rank, where it is not `rank`
    expert_rank: int = 0  # of the update of each expert's matrix
    full_values: int = 0  # values of modules to save; of kind full, of all weights that train
    head_trains: bool = False  # whether the LM head is one of these modules

    @property
    def values(self) -> int:
        """Values that train."""
        return self.low_rank + self.full_values

    @cached_property
    def low_rank(self) -> int:
        """Values of A and B, and of dora's magnitudes."""
        return self.magnitudes + sum(
            self.rank_of(matrix) * matrix.copies * (matrix.in_features + matrix.out_features)
            for matrix in self.matrices
        )

    @cached_property
    def expert_values(self) -> int:
        """Values of the updates of experts."""
        experts = (matrix for matrix in self.matrices if matrix.experts)
        return sum(self.rank_of(m) * m.copies * (m.in_features + m.out_features) for m in experts)

    def rank_of(self, matrix: Matrix) -> int:
        """The rank of a matrix's update; of an expert's, `expert_rank`."""
        return self.ranks.get(matrix.path, self.expert_rank if matrix.experts else self.rank)

    def values_in_tensors_below(self, values: int) -> int:
        """Values of A and B matrices that hold fewer than `values` each."""
        return self.magnitudes + sum(size * count for size, count in self._tensors_of_size.items() if size < values)

    @cached_property
    def _tensors_of_size(self) -> Counter[int]:
        """How many of the A and B matrices hold so many values; counted once, since a search makes many plans."""
        return Counter(
            self.rank_of(matrix) * matrix.copies * features  # the updates of a stack of experts are one tensor
            for matrix in self.matrices
            for features in (matrix.in_features, matrix.out_features)
        )

    @cached_property
    def magnitudes(self) -> int:
        """Values of dora's magnitudes, one for each row of W; dora also stores the square of each row's norm."""
        return sum(matrix.out_features for matrix in self.matrices) if self.kind == "dora" else 0

    @property
    def held_bytes(self) -> int:
        """Bytes of the adapters' tensors, all of them float32."""
        return 4 * ((2 if self.keeps_init else 1) * self.low_rank + self.magnitudes + self.full_values)

    @cached_property
    def paths_in_block(self) -> frozenset[str]:
        """The paths within a decoder layer that are adapted in any layer: `self_attn.q_proj`."""
        return frozenset(re.split(r"\.\d+\.", matrix.path, maxsplit=1)[-1] for matrix in self.matrices)


@dataclass(frozen=True)
class WaitingAdapters:
    """Bytes of the other adapters of a sweep while one of them trains: their values and their optimizer moments.

    Gradients exist only during a step, so a waiting adapter has none.
    """

    adapters: int = 0
    moments: int = 0
    host_moments: int = 0  # of paged and offloaded optimizers, in host memory


@dataclass(frozen=True)
class Workload:
    """One rank's part of a training run, as far as its memory goes."""

    shapes: Shapes
    adapters: AdapterSizes
    quantizer: Quantizer
    dtype_bytes: int  # of embeddings, head, norms, and of activations between products
    optimizer: str  # optim.kind
    micro_batch: int  # sequences
    max_length: int  # tokens of a sequence
    packing: bool  # sequences hold several documents
    attention: str  # the kernel, as in model.attention
    device: Literal["cuda", "cpu"]
    recompute: int | None = None  # how many layers, from the first, recompute in backward; None: all
    offload: int = 0  # how many layers, from the first, offload their activations; the last one never does
    weights: Weights = "resident"
    resident_layers: int = 0  # of a streamed base, how many layers stay on the device
    host_embedding: bool = False  # the embedding is in host memory; it always is while layers stream
    processes: int = 1
    waiting: WaitingAdapters = field(default_factory=WaitingAdapters)
    float16: bool = False  # products of frozen matrices in float16, all else (`dtype_bytes`) in float32
    kept: KeptBytes = field(default_factory=KeptBytes)  # matrices that stay in 16 bits beside quantized ones
    rows: int = 1  # padded rows of each sequence: 2 where the answers of a pair are rows of their own
    sharded: bool = False  # FSDP: every rank holds a shard of the frozen base and all-gathers a layer when it is used

    @property
    def shards(self) -> int:
        """The number of shards of the frozen base."""
        return self.processes if self.sharded else 1

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch * self.rows * self.max_length

    @property
    def logits_bytes(self) -> int:
        """Bytes of the float32 logits that are computed at a time."""
        return LOGITS_CHUNK_BYTES[self.device]

    @property
    def token_pairs(self) -> int:
        """Pairs of tokens in a micro-batch: T x T of every sequence."""
        return self.micro_batch * self.rows * self.max_length**2

    @property
    def eager(self) -> bool:
        """Whether every head's T x T scores are in memory: set by the recipe, or since no kernel has a soft cap."""
        return self.attention == "eager" or (self.attention == "auto" and self.shapes.flags.softcap)

    def is_masked(self, window: int | None) -> bool:
        """Whether attention takes a T x T mask: for documents under `sdpa`, or for a window below max_length."""
        windowed = window is not None and window < self.max_length
        if self.attention == "auto":
            return windowed and self.device == "cpu" and not self.eager and not self.cpu_kernel
        return self.attention == "sdpa" and (windowed or self.packing)

    def is_unfused(self, attention: Attention) -> bool:
        """Whether no kernel computes this attention: a CPU's takes values of the queries' size only."""
        sizes_differ = attention.head_dim != attention.value_dim
        return self.device == "cpu" and sizes_differ and not self.eager and not self.cpu_kernel

    def repeats_keys(self, layer: Layer) -> bool:
        """Whether attention repeats keys and values for every query head: where no kernel takes grouped heads."""
        float32_on_gpu = self.device == "cuda" and self.dtype_bytes == 4
        window = layer.attention.window if layer.attention else None
        return self.eager or self.is_masked(window) or float32_on_gpu

    @property
    def by_document(self) -> bool:
        """Whether attention runs document by document and concatenates the outputs."""
        on_cpu = self.attention == "auto" and self.device == "cpu" and not self.eager
        return self.packing and on_cpu and not self.cpu_kernel

    @property
    def cpu_kernel(self) -> bool:
        """Whether attention runs in model/cpu_attention.py, which takes 16 bits and saves only its inputs."""
        return self.attention == "auto" and self.device == "cpu" and not self.eager and self.dtype_bytes == 2

    def adapter_reads(self, layer: Layer, tensor: str) -> bool:
        """Whether an adapter of any such layer reads, and so saves, that tensor of its layer."""
        return any(matrix.reads == tensor and matrix.path in self.adapters.paths_in_block for matrix in layer.matrices)

    @property
    def recomputed(self) -> int:
        """The number of layers that recompute."""
        return self.shapes.layers if self.recompute is None else min(self.recompute, self.shapes.layers)

    @property
    def offloaded(self) -> int:
        """The number of layers that offload their activations."""
        return min(self.offload, self.shapes.layers - 1)

    @property
    def streamed(self) -> int:
        """The number of layers whose frozen matrices are copied from host memory whenever they are used."""
        return max(0, self.shapes.layers - self.resident_layers) if self.weights == "stream" else 0

    @property
    def embedding_on_host(self) -> bool:
        """Whether the embedding is in host memory: never if it is tied to the head or there are several ranks."""
        can_be = self.device == "cuda" and not self.shapes.tied and self.processes == 1 and not self.sharded
        return can_be and (self.host_embedding or self.weights == "stream")

    @cached_property
    def stored_bytes(self) -> dict[Layer, int]:
        """Stored bytes of the matrices of each kind of layer; every expert's matrix is quantized by itself."""
        return {layer: sum(self._stored(matrix) for matrix in layer.matrices) for layer in self.shapes.kinds}

    @cached_property
    def outside_bytes(self) -> int:
        """Stored bytes of the decoder's matrices outside of its layers, which never stream."""
        return sum(self._stored(matrix) for matrix in self.shapes.outside) + self.kept.outside

    def _stored(self, matrix: Matrix) -> int:
        return matrix.copies * self.quantizer.stored_bytes(matrix.out_features, matrix.in_features, self.dtype_bytes)

    @cached_property
    def widest_layer_bytes(self) -> int:
        """Stored bytes of the largest layer's matrices."""
        kinds, order = self.shapes.kinds, self.shapes.order
        kept = (self.stored_bytes[kinds[order[layer]]] + size for layer, size in self.kept.layers.items())
        return max((*self.stored_bytes.values(), *kept))

    def bytes_of_layers(self, layers: Collection[int]) -> int:
        """Stored bytes of the matrices of some layers."""
        kept = sum(self.kept.layers.get(layer, 0) for layer in layers) if self.kept.layers else 0
        return kept + sum(count * self.stored_bytes[layer] for layer, count in self.shapes.kinds_in(layers))

    @cached_property
    def streamed_bytes(self) -> int:
        """Stored bytes of the layers that stream: they are spread evenly, as in memory/weight_streaming.py."""
        streamed, layers = self.streamed, self.shapes.layers
        if len(self.shapes.kinds) == 1 and not self.kept.layers:
            return streamed * self.widest_layer_bytes
        spread = (layer for layer in range(layers) if (layer + 1) * streamed // layers > layer * streamed // layers)
        return self.bytes_of_layers([*spread])

    @cached_property
    def all_layer_bytes(self) -> int:
        """Stored bytes of all layers."""
        kept = sum(self.kept.layers.values())
        return kept + sum(count * self.stored_bytes[layer] for layer, count in self.shapes.all_kinds)

    @cached_property
    def dequantized_bytes(self) -> int:
        """Bytes of the largest matrix of a layer while it is rebuilt, with what the quantizer needs on top of it."""
        return max(
            self.quantizer.scratch_bytes(matrix.out_features, matrix.in_features, self.dtype_bytes)
            + (2 * self.tokens * (matrix.in_features + matrix.out_features) if self.float16 else 0)  # rounded copies
            for layer in self.shapes.kinds
            for matrix in layer.matrices
        )
