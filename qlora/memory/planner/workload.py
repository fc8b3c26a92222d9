"""What is to be planned, in plain values: shapes of the base, how it is stored, what trains, on how much at a time."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from qlora.memory.planner.shapes import Matrix, Shapes

Weights = Literal["resident", "stream"]

LOGITS_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}  # of float32 logits at a time, as the loss chunks them
NESTED_BLOCK = 256  # absmax values that share one nested absmax


@dataclass(frozen=True)
class Storage:
    """How the frozen matrices are stored; `block` and `double` mean nothing for `dense`."""

    kind: str = "nf4"
    double: bool = True
    block: int = 64

    def matrix_bytes(self, weights: int, dtype_bytes: int) -> int:
        """Bytes of one matrix: 0.51587 a weight in 4 bits with double quantisation (block 64), 0.5625 without."""
        if self.kind == "dense":
            return weights * dtype_bytes
        codes, blocks = -(-weights // 2), -(-weights // self.block)
        return codes + (blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if self.double else 4 * blocks)

    def scratch_bytes(self, weights: int) -> int:
        """Bytes held beside W while it is rebuilt: the absmax in float32, before and after its offset is added."""
        return 0 if self.kind == "dense" or not self.double else 8 * -(-weights // self.block)


@dataclass(frozen=True)
class AdapterSizes:
    """The low-rank layers: float32 A [R, I] and B [O, R] beside each of `matrices`."""

    matrices: tuple[Matrix, ...]
    kind: str = "lora"
    rank: int = 16
    dropout: bool = False
    starts: bool = False  # where A and B started is kept beside them
    ranks: Mapping[str, int] = field(default_factory=dict)  # path -> rank, where it is another one
    whole: int = 0  # values of modules that train whole; of kind full, all that train
    whole_head: bool = False  # whether the head is one of them

    @property
    def values(self) -> int:
        """Values that train."""
        return self.low_rank + self.whole

    @cached_property
    def low_rank(self) -> int:
        """Values of the updates; dora trains one magnitude a row as well."""
        return self.rows + sum(
            self.ranks.get(each.path, self.rank) * (each.in_features + each.out_features) for each in self.matrices
        )

    @cached_property
    def rows(self) -> int:
        """Rows whose length dora trains; it also holds the square of each."""
        return sum(each.out_features for each in self.matrices) if self.kind == "dora" else 0

    @property
    def held_bytes(self) -> int:
        """What stands for the adapters, all of it float32."""
        return 4 * ((2 if self.starts else 1) * self.low_rank + self.rows + self.whole)

    @cached_property
    def paths_in_block(self) -> frozenset[str]:
        """The paths within a decoder layer that are adapted in any layer: `self_attn.q_proj`."""
        return frozenset(re.split(r"\.\d+\.", each.path, maxsplit=1)[-1] for each in self.matrices)


@dataclass(frozen=True)
class WaitingAdapters:
    """Bytes of adapters that wait while this one has its turn: themselves, and the moments of their optimisers.

    Gradients last a step, so nobody has any who waits.
    """

    adapters: int = 0
    moments: int = 0
    host_moments: int = 0  # of paged and hosted optimisers, which wait in main memory


@dataclass(frozen=True)
class Workload:
    """One process's share of a training run, as far as its memory goes."""

    shapes: Shapes
    adapters: AdapterSizes
    storage: Storage = field(default_factory=Storage)
    dtype_bytes: int = 2  # of the compute dtype: embeddings, head, norms, activations
    optimizer: str = "paged_adamw_32bit"
    micro_batch: int = 1
    max_length: int = 2048  # tokens of a row
    packing: bool = True  # rows hold several documents
    attention: str = "auto"  # the kernel, as model.attention says it
    recompute: int | None = None  # the first layers, recomputed in backward; None: all
    offloaded: int = 0  # the first layers, which park what they keep in host memory; the last one never does
    weights: Weights = "resident"
    resident_layers: int = 0  # of a streamed base, how many layers stay on the device
    gathers: bool = False  # the rows of the embedding come from main memory, as they always do while layers stream
    device: Literal["cuda", "cpu"] = "cuda"
    processes: int = 1
    beside: WaitingAdapters = field(default_factory=WaitingAdapters)
    sharded: bool = False  # every process holds its share of what is frozen, and gathers a layer when it is its turn

    @property
    def share(self) -> int:
        """Processes that share what is frozen."""
        return self.processes if self.sharded else 1

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch * self.max_length

    @property
    def logits_bytes(self) -> int:
        """Bytes of float32 logits that are computed at a time."""
        return LOGITS_BYTES[self.device]

    @property
    def squares(self) -> int:
        """Pairs of tokens in a micro-batch, T x T of every row."""
        return self.micro_batch * self.max_length**2

    @property
    def eager(self) -> bool:
        """Whether every head's T x T scores exist: asked for, or since no kernel here caps them."""
        return self.attention == "eager" or (self.attention == "auto" and self.shapes.family.softcap)

    @property
    def masked(self) -> bool:
        """Whether attention takes a T x T mask: for documents under `sdpa`, for a window shorter than the row."""
        windowed = self.shapes.window is not None and self.shapes.window < self.max_length
        if self.attention == "auto":
            return windowed and self.device == "cpu" and not self.eager and not self.in_blocks
        return self.attention == "sdpa" and (windowed or self.packing)

    @property
    def cut(self) -> bool:
        """Whether attention goes document by document and joins the parts."""
        on_cpu = self.attention == "auto" and self.device == "cpu" and not self.eager
        return self.packing and on_cpu and not self.in_blocks

    @property
    def in_blocks(self) -> bool:
        """Whether attention runs in the CPU's own kernel, which takes 16 bits and keeps nothing but what it reads."""
        return self.attention == "auto" and self.device == "cpu" and not self.eager and self.dtype_bytes == 2

    def reads(self, what: str) -> bool:
        """Whether an adapter of any layer reads, and so keeps, that tensor of its layer."""
        return any(each.reads == what and each.path in self.adapters.paths_in_block for each in self.shapes.block)

    @property
    def recomputed(self) -> int:
        """Layers that recompute."""
        return self.shapes.layers if self.recompute is None else min(self.recompute, self.shapes.layers)

    @property
    def parked(self) -> int:
        """Layers that park what they keep."""
        return min(self.offloaded, self.shapes.layers - 1)

    @property
    def streamed(self) -> int:
        """Layers whose frozen matrices come from host memory each time."""
        return max(0, self.shapes.layers - self.resident_layers) if self.weights == "stream" else 0

    @property
    def embeds_on_host(self) -> bool:
        """Whether the embedding stays in main memory: not where it is the head too, nor where processes share it."""
        apart = self.device == "cuda" and not self.shapes.tied and self.processes == 1 and not self.sharded
        return apart and (self.gathers or self.weights == "stream")

    @cached_property
    def layer_bytes(self) -> int:
        """Stored bytes of one layer's matrices."""
        return sum(self.storage.matrix_bytes(each.weights, self.dtype_bytes) for each in self.shapes.block)
