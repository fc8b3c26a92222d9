"""Attention of one layer from config.json: its heads, the matrices around it, and what its norms and sinks hold."""

from qlora.memory.planner.config_values import ConfigValues
from qlora.memory.planner.layer_types import MixerType
from qlora.memory.planner.shapes import (
    ATTENTION_INPUT,
    ATTENTION_OUTPUT,
    OTHER_INPUT,
    Attention,
    LayerPart,
    Matrix,
)


def attention_part(config: ConfigValues, index: int, mixer: MixerType) -> tuple[Attention, LayerPart]:
    """Attention over heads of one size, or over latent queries, keys and values."""
    if config.family.latent:
        return _latent_attention(config)
    family, hidden, heads = config.family, config.size("hidden_size"), config.size("num_attention_heads")
    head_dim = config.size("head_dim", default=hidden // heads)
    kv_heads = config.size("num_key_value_heads", default=heads)
    value_matrix = True
    if mixer == "full" and family.global_heads:
        head_dim = config.size("global_head_dim")
        if config.enabled("attention_k_eq_v"):
            value_matrix, kv_heads = False, config.size("num_global_key_value_heads", default=kv_heads)
    shared = index >= config.size("num_hidden_layers", default=index + 1) - config.size(
        "num_kv_shared_layers", default=0, least=0
    )
    norms = _query_key_norms(config, heads * head_dim, kv_heads * head_dim, head_dim)
    gate = {"": 0, "heads": heads}.get(family.gate, heads * head_dim)
    attention = Attention(heads, kv_heads, head_dim, head_dim, norms, _window(config, mixer), gate, shared=shared)
    matrices = _projections(config, attention, value_matrix)
    sinks = heads if family.sinks else 0
    return attention, LayerPart(matrices, norms[0] if shared else sum(norms), sinks)


def _projections(config: ConfigValues, attention: Attention, value_matrix: bool) -> tuple[Matrix, ...]:
    """The matrices around attention, in the model's order."""
    family, hidden = config.family, config.size("hidden_size")
    query = attention.query * (2 if family.gate == "doubled" else 1)
    names = family.projections
    outputs = [query + 2 * attention.key] if family.fused else [query, attention.key, attention.value]
    kept = [True, not attention.shared, value_matrix and not attention.shared][: len(outputs)]
    bias = config.enabled(family.qkv_bias)
    matrices = [
        Matrix(f"{family.attention}.{name}", out_features, hidden, bias, ATTENTION_INPUT)
        for name, out_features, present in zip(names, outputs, kept, strict=False)
        if present
    ]
    out_bias = config.enabled(family.output_bias)
    matrices.append(Matrix(f"{family.attention}.{names[-1]}", hidden, attention.output, out_bias, ATTENTION_OUTPUT))
    if family.gate in ("full", "heads"):
        matrices.append(
            Matrix(f"{family.attention}.{family.gate_name}", attention.gate, hidden, False, ATTENTION_INPUT)
        )
    return tuple(matrices)


def _latent_attention(config: ConfigValues) -> tuple[Attention, LayerPart]:
    """Multi-head latent attention: low-rank queries if the rank is set, low-rank keys and values."""
    family, hidden, heads = config.family, config.size("hidden_size"), config.size("num_attention_heads")
    rotary, plain = config.size("qk_rope_head_dim", least=0), config.size("qk_nope_head_dim")
    value_dim, low = config.size("v_head_dim"), config.size("kv_lora_rank")
    rank = None if config.text.get("q_lora_rank") is None else config.size("q_lora_rank")  # null: full-rank queries
    bias = config.enabled(family.qkv_bias)
    query = heads * (plain + rotary)
    path = f"{family.attention}."
    queries = [Matrix(f"{path}q_proj", query, hidden, False, ATTENTION_INPUT)]
    if rank:
        queries = [
            Matrix(f"{path}q_a_proj", rank, hidden, bias, ATTENTION_INPUT),
            Matrix(f"{path}q_b_proj", query, rank, False, OTHER_INPUT),
        ]
    matrices = (
        *queries,
        Matrix(f"{path}kv_a_proj_with_mqa", low + rotary, hidden, bias, ATTENTION_INPUT),
        Matrix(f"{path}kv_b_proj", heads * (plain + value_dim), low, False, OTHER_INPUT),
        Matrix(f"{path}o_proj", hidden, heads * value_dim, bias, ATTENTION_OUTPUT),
    )
    latent = (rank or 0) + low + 2 * rotary
    window = _window(config, "full")
    attention = Attention(heads, heads, plain + rotary, value_dim, (0, 0), window, latent=latent)
    return attention, LayerPart(matrices, (rank or 0) + low)


def _query_key_norms(config: ConfigValues, query: int, key: int, head_dim: int) -> tuple[int, int]:
    """Values of the norms of queries and keys in one layer; zeros without them."""
    if config.family.flat_norms:
        return query, key
    return (head_dim, head_dim) if config.enabled(config.family.head_norms) else (0, 0)


def _window(config: ConfigValues, mixer: MixerType) -> int | None:
    """The sliding window in tokens, if the layer uses one."""
    listed = config.get("layer_types", "layers_block_type") is not None
    used = config.enabled(config.family.window) and config.text.get("sliding_window")
    return config.size("sliding_window") if used and (mixer == "sliding" or not listed) else None
