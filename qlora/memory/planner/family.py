"""What a line of the tables of architectures says: names, switches and forms of one family's decoder layers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ConfigSwitch = bool | str  # True, False, or the key of config.json that decides
BEFORE = ("input_layernorm", "post_attention_layernorm")
AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
AROUND = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class ExpertForm:
    """How a family lays out its experts: a stack for gate and up together (or up alone), and one for down."""

    width: str = "moe_intermediate_size"  # key of config.json
    module: str = "mlp"
    gated: bool = True
    bias: bool = False
    router_values: int = 0  # of each expert, next to the router's row of hidden size
    shared: str = ""  # name of the shared experts' module in `module`; empty: there are none
    shared_width: str = ""  # key of their inner width; empty: the experts' width times their number
    shared_gate: bool = False  # a gate [1, H] on the shared experts' output
    kept: int = 0  # tensors of the inner width that the gate saves for backward; 0: gate, up, act(gate), or up, act(up)
    beside_dense: bool = False  # the layer has a dense MLP too, whose width is intermediate_size


@dataclass(frozen=True)
class RecurrentForm:
    """How a family lays out its recurrent mixers."""

    kind: Literal["delta", "delta_fused", "delta_split", "kda", "mamba", "mamba2", "conv"]
    module: str
    beside_attention: bool = False  # every layer has attention as well


@dataclass(frozen=True)
class Family:
    """The ways in which one architecture differs from others."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    layers_path: str = "model.layers"
    embedding: str = "embed_tokens"
    last_norm: str = "norm"
    attention: str = "self_attn"
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")  # two: query, key and value are one matrix
    mlp_module: str = "mlp"
    mlp_width: str = "intermediate_size"  # key of config.json
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")  # two: gate and up are one matrix, or there is no gate
    qkv_bias: ConfigSwitch = False
    output_bias: ConfigSwitch = False
    mlp_bias: ConfigSwitch = False
    gated: bool = True  # act(gate) * up; else act(up) alone
    layer_norm: bool = False  # LayerNorm with a bias, in the compute dtype; else RMSNorm in float32
    sequential: bool = False  # of layer_norm families: the MLP always follows attention
    wide_norms: tuple[str, ...] = BEFORE  # over the hidden size, in one layer
    head_norms: ConfigSwitch = False  # a norm over each head's query and key
    flat_norms: bool = False  # a norm over all query heads together, and one over all key heads
    softcap: bool = False  # of attention scores: attention is eager then, with T x T scores in memory
    scaled: bool = False  # the logits are multiplied by a scale
    final_softcap: ConfigSwitch = False  # of the logits
    head_bias: ConfigSwitch = False  # of the LM head
    window: ConfigSwitch = False  # whether `sliding_window` is used
    sinks: bool = False  # a learned value in the softmax of each head
    gate: Literal["", "doubled", "full", "heads"] = ""  # on attention's output: in q_proj, or a matrix of its own
    gate_name: str = "gate_proj"
    latent: bool = False  # low-rank queries, keys and values (arXiv:2405.04434)
    mlp_kept: int = 0  # tensors of the inner width that an MLP saves for backward; 0: gate and up, or up alone
    joined_rotary: bool = False  # rotated and other features are concatenated, which changes the kernel's layout
    activation_values: int = 0  # learned values of an MLP's activation function
    global_heads: bool = False  # full attention has heads of another size than attention in a window (Gemma 4)
    layer_inputs: bool = False  # an embedding that every layer reads (Gemma 3n and 4)
    alternating: bool = False  # predicted and corrected streams, and low-rank branches (Gemma 3n)
    one_part: bool = False  # a layer is a mixer or an MLP, not both (Nemotron-H)
    experts: ExpertForm | None = None
    recurrent: RecurrentForm | None = None

    @property
    def fused(self) -> bool:
        """Whether query, key and value are one matrix."""
        return len(self.projections) == 2


def sizes(*values: int, **others: Any) -> dict[str, Any]:
    """Default values of config.json: the six sizes by position, other keys by name."""
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {**dict(zip((*keys, "num_key_value_heads"), values, strict=False)), **others}
