"""The exact shapes of a base model: its linear layers, norms, embedding and head, and how many values each has."""

from dataclasses import dataclass, replace
from functools import cached_property

from qlora.memory.planner.architectures import Family

# What a linear layer reads; layers that read the same tensor keep it once.
ATTENTION_INPUT, ATTENTION_OUTPUT = "attention_input", "attention_output"
MLP_INPUT, MLP_HIDDEN = "mlp_input", "mlp_hidden"


@dataclass(frozen=True)
class Matrix:
    """A linear layer: W [O, I], perhaps a bias [O], and which tensor of its decoder layer it reads."""

    path: str
    out_features: int
    in_features: int
    bias: bool
    reads: str

    @property
    def weights(self) -> int:
        """Values of W, the bias left out."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Shapes:
    """A decoder whose layers are all alike, its embedding, its head and what stands beside it."""

    name: str
    family: Family
    dtype: str | None  # the base's own, as its config.json names it
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool  # the head is the embedding
    block: tuple[Matrix, ...]  # of one layer, paths within it
    layers_path: str
    parallel: bool  # attention and MLP read the same hidden state
    window: int | None  # tokens a sliding attention sees
    vision: int  # parameters of a vision tower and its projector

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The linear layers of the decoder by their paths in the model, in order: what is quantised and adapted."""
        return tuple(
            replace(each, path=f"{self.layers_path}.{layer}.{each.path}")
            for layer in range(self.layers)
            for each in self.block
        )

    @property
    def query(self) -> int:
        """Features of all query heads together."""
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """Features of all key heads together; of all value heads as well."""
        return self.kv_heads * self.head_dim

    @property
    def embedding(self) -> int:
        """Values of the token embedding."""
        return self.vocabulary * self.hidden

    @property
    def head(self) -> int:
        """Values of the output head; 0 if it is the embedding."""
        return 0 if self.tied else self.embedding

    @cached_property
    def norms(self) -> int:
        """Values of all norms, their biases included."""
        wide = self.hidden * (2 if self.family.layer_norm else 1)
        heads = 2 * self.head_dim if self.family.head_norms else 0
        return self.layers * (self.family.wide_norms * wide + heads) + wide

    @cached_property
    def biases(self) -> int:
        """Values of the linear layers' biases."""
        return self.layers * sum(each.out_features for each in self.block if each.bias)

    @cached_property
    def quantised(self) -> int:
        """Values of the linear layers' matrices: what is stored in 4 bits."""
        return self.layers * sum(each.weights for each in self.block)

    @property
    def parameters(self) -> int:
        """All parameters of the model, a tied head counted once."""
        return self.quantised + self.biases + self.norms + self.embedding + self.head + self.vision
