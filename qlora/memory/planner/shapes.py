"""The shapes of a base model: the parts of each decoder layer, embedding and head, and how many values each has.

Layers of one kind (the same parts of the same sizes) share one `Layer`; a hybrid or a mixture of experts has several.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

# The input of a linear layer; layers that read the same tensor save it once.
ATTENTION_INPUT, ATTENTION_OUTPUT = "attention_input", "attention_output"
MLP_INPUT, MLP_HIDDEN = "mlp_input", "mlp_hidden"
EXPERT_INPUT, EXPERT_HIDDEN = "expert_input", "expert_hidden"
MIXER_INPUT, MIXER_OUTPUT = "mixer_input", "mixer_output"
OTHER_INPUT = "other_input"


@dataclass(frozen=True)
class Matrix:
    """A linear layer: W [O, I], its bias [O] if any, and which tensor of its decoder layer it reads.

    `experts`: how many experts have such a matrix, each with a W of its own; 0: it is a plain layer.
    """

    path: str
    out_features: int
    in_features: int
    bias: bool
    reads: str
    experts: int = 0

    @property
    def weights(self) -> int:
        """Values of one W, without the bias."""
        return self.out_features * self.in_features

    @property
    def copies(self) -> int:
        """How many W there are: one for each expert."""
        return self.experts or 1


@dataclass(frozen=True)
class Attention:
    """Softmax attention: heads, and what it keeps for backward beyond query, key, value and output."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int  # of one head; head_dim but for latent attention
    norms: tuple[int, int]  # values of the norms of queries and keys; zeros without them
    window: int | None  # tokens of sliding window attention
    gate: int = 0  # features of a gate on the output
    latent: int = 0  # features of the compressed queries, keys and values (arXiv:2405.04434)
    shared: bool = False  # its keys and values are those of an earlier layer

    @property
    def query(self) -> int:
        """Features of all query heads together."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Features of all key heads together."""
        return self.kv_heads * self.head_dim

    @property
    def value(self) -> int:
        """Features of all value heads together."""
        return self.kv_heads * self.value_dim

    @property
    def output(self) -> int:
        """Features of all heads' outputs together."""
        return self.heads * self.value_dim


@dataclass(frozen=True)
class Recurrent:
    """A mixer with a state (Gated DeltaNet, Mamba, short convolution): what it keeps for backward, per token."""

    kept: int  # values in the compute dtype
    kept_float32: int  # values that its formulas compute in float32
    working: int  # values in float32 that its backward needs on top


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: how many there are, how many a token visits, and their inner width."""

    count: int
    per_token: int
    width: int
    kept: int  # tensors of that width that the gate saves for backward


class LayerPart(NamedTuple):
    """A part of a layer as it is read: its matrices, values of its norms, and other values that stay in 16 bits."""

    matrices: tuple[Matrix, ...] = ()
    norms: int = 0
    others: int = 0


@dataclass(frozen=True, eq=False)  # a kind is itself a key; comparing its parts would be slow
class Layer:
    """One kind of decoder layer."""

    matrices: tuple[Matrix, ...]  # what is quantized and adapted, with paths within the layer
    attention: Attention | None
    recurrent: Recurrent | None
    mlp: int  # features inside the dense MLP or the shared experts; 0 without them
    mlp_kept: int  # tensors of that width that the MLP saves for backward
    experts: Experts | None
    wide_norms: tuple[str, ...]  # names of the norms over the hidden size
    norms: int  # values of all norms, with their biases
    others: int = (
        0  # values that stay in 16 bits: routers, gates, convolutions, decays, matrices that can't be replaced
    )
    parallel: bool = False  # attention and MLP read the same hidden state
    norms_after: bool = False  # norms come after attention and MLP only
    kept: int = 0  # further values per token that are saved for backward, in the compute dtype
    streams: int = 1  # hidden states between two layers (Gemma 3n has four)

    @cached_property
    def weights(self) -> int:
        """Values of the matrices."""
        return sum(matrix.weights * matrix.copies for matrix in self.matrices)

    @cached_property
    def biases(self) -> int:
        """Values of the linear layers' biases."""
        return sum(matrix.out_features * matrix.copies for matrix in self.matrices if matrix.bias)

    @cached_property
    def widest(self) -> int:
        """Values of the largest W: one expert's counts by itself."""
        return max((matrix.weights for matrix in self.matrices), default=0)


@dataclass(frozen=True)
class ModelFlags:
    """How a family differs from others in the formulas of activations, and in names."""

    layer_norm: bool = False  # LayerNorm with a bias, in the compute dtype; else RMSNorm in float32
    flat_norms: bool = False  # a norm over all query heads together, and one over all key heads
    fused: bool = False  # query, key and value are one matrix
    joined_rotary: bool = False  # the kernel's output has another layout than the next product reads
    softcap: bool = False  # of attention scores: attention is eager then, with T x T scores in memory
    scaled: bool = False  # the logits are multiplied by a scale
    final_softcap: bool = False  # of the logits
    attention: str = "self_attn"  # names of modules
    embedding: str = "embed_tokens"
    last_norm: str = "norm"


@dataclass(frozen=True)
class Shapes:
    """A decoder, its embedding, its head; what a checkpoint holds besides is counted apart, since it is not loaded."""

    name: str
    flags: ModelFlags
    dtype: str | None  # as in config.json
    vocabulary: int
    hidden: int
    tied: bool  # the head is the embedding matrix
    kinds: tuple[Layer, ...]
    order: tuple[int, ...]  # the kind of each layer
    layers_path: str
    others: int = 0  # 16-bit values outside of the layers, without embedding, head and last norm
    outside: tuple[Matrix, ...] = ()  # quantized matrices outside of the layers, with paths in the model
    layer_table: int = 0  # values of an embedding that every layer reads (Gemma 3n and 4), in host memory
    stored_only: int = 0  # parameters of the checkpoint that are not loaded: towers, heads of other tokens

    @property
    def layers(self) -> int:
        """The number of decoder layers."""
        return len(self.order)

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """The linear layers of the decoder, with paths in the model, in order: what is quantized and adapted."""
        inside = (
            Matrix(f"{self.layers_path}.{layer}.{m.path}", m.out_features, m.in_features, m.bias, m.reads, m.experts)
            for layer, kind in enumerate(self.order)
            for m in self.kinds[kind].matrices
        )
        return (*self.outside, *inside)

    def kinds_in(self, layers: Collection[int]) -> list[tuple[Layer, int]]:
        """The kinds of some layers, each with how many of these layers are of it."""
        if len(self.kinds) == 1:  # a search asks often
            return [(self.kinds[0], len(layers))] if layers else []
        counts = [0] * len(self.kinds)
        for layer in layers:
            counts[self.order[layer]] += 1
        return [(kind, count) for kind, count in zip(self.kinds, counts, strict=True) if count]

    @cached_property
    def all_kinds(self) -> tuple[tuple[Layer, int], ...]:
        """Every kind of layer, each with how many layers are of it."""
        return tuple(self.kinds_in(range(self.layers)))

    @property
    def embedding(self) -> int:
        """Values of the token embedding."""
        return self.vocabulary * self.hidden

    @property
    def head(self) -> int:
        """Values of the LM head; 0 if it is tied to the embedding."""
        return 0 if self.tied else self.embedding

    @property
    def last_norm(self) -> int:
        """Values of the norm before the head."""
        return self.hidden * (2 if self.flags.layer_norm else 1)

    @cached_property
    def norms(self) -> int:
        """Values of all norms, with their biases."""
        return self.last_norm + sum(count * layer.norms for layer, count in self.all_kinds)

    @cached_property
    def biases(self) -> int:
        """Values of the linear layers' biases."""
        return sum(count * layer.biases for layer, count in self.all_kinds)

    @cached_property
    def kept_16bit(self) -> int:
        """Values of routers, gates, convolutions and the like, in the layers and outside of them."""
        return self.others + sum(count * layer.others for layer, count in self.all_kinds)

    @cached_property
    def quantized(self) -> int:
        """Values of the linear layers' matrices: what is quantized."""
        inside = sum(count * layer.weights for layer, count in self.all_kinds)
        return inside + sum(matrix.weights for matrix in self.outside)

    @cached_property
    def widest(self) -> int:
        """Values of the largest W: one expert's counts by itself."""
        return max(layer.widest for layer in self.kinds)

    @property
    def parameters(self) -> int:
        """All parameters of the loaded model, a tied head counted once."""
        frozen = self.quantized + self.biases + self.norms + self.kept_16bit
        return frozen + self.embedding + self.head + self.layer_table
