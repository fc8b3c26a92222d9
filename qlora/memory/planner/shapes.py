"""The shapes of a base model: linear layers, norms, embedding and head, and how many values each has."""

from dataclasses import dataclass, replace
from functools import cached_property

from qlora.memory.planner.architectures import Family

# The input of a linear layer; layers that read the same tensor save it once.
ATTENTION_INPUT, ATTENTION_OUTPUT = "attention_input", "attention_output"
MLP_INPUT, MLP_HIDDEN = "mlp_input", "mlp_hidden"


@dataclass(frozen=True)
class Matrix:
    """A linear layer: W [O, I], its bias [O] if any, and which tensor of its decoder layer it reads."""

    path: str
    out_features: int
    in_features: int
    bias: bool
    reads: str

    @property
    def weights(self) -> int:
        """Values of W, without the bias."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Shapes:
    """A decoder with identical layers, its embedding, its head, and a vision tower if the model has one."""

    name: str
    family: Family
    dtype: str | None  # as in config.json
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool  # the head is the embedding matrix
    block: tuple[Matrix, ...]  # the linear layers of one decoder layer, with paths within it
    layers_path: str
    parallel: bool  # attention and MLP read the same hidden state
    window: int | None  # tokens of sliding window attention
    vision: int  # parameters of a vision tower and its projector

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The linear layers of the decoder, with paths in the model, in order: what is quantized and adapted."""
        return tuple(
            replace(matrix, path=f"{self.layers_path}.{layer}.{matrix.path}")
            for layer in range(self.layers)
            for matrix in self.block
        )

    @property
    def query(self) -> int:
        """Features of all query heads together."""
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """Features of all key heads together, and of all value heads together."""
        return self.kv_heads * self.head_dim

    @property
    def embedding(self) -> int:
        """Values of the token embedding."""
        return self.vocabulary * self.hidden

    @property
    def head(self) -> int:
        """Values of the LM head; 0 if it is tied to the embedding."""
        return 0 if self.tied else self.embedding

    @cached_property
    def norms(self) -> int:
        """Values of all norms, with their biases."""
        wide = self.hidden * (2 if self.family.layer_norm else 1)
        return self.layers * (len(self.family.wide_norms) * wide + sum(self.query_key_norms)) + wide

    @property
    def query_key_norms(self) -> tuple[int, int]:
        """Values of the norms of queries and keys in one layer; zeros without them."""
        if self.family.flat_norms:
            return self.query, self.key_value
        return (self.head_dim, self.head_dim) if self.family.head_norms else (0, 0)

    @cached_property
    def biases(self) -> int:
        """Values of the linear layers' biases."""
        return self.layers * sum(matrix.out_features for matrix in self.block if matrix.bias)

    @cached_property
    def quantized(self) -> int:
        """Values of the linear layers' matrices: what is quantized."""
        return self.layers * sum(matrix.weights for matrix in self.block)

    @property
    def parameters(self) -> int:
        """All parameters of the model, a tied head counted once."""
        return self.quantized + self.biases + self.norms + self.embedding + self.head + self.vision
