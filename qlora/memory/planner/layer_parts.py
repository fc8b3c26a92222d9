"""One decoder layer from config.json: attention, MLP, experts and mixer, with the matrices and values of each."""

from qlora.memory.planner.attention_part import attention_part
from qlora.memory.planner.config_values import EXPERT_COUNT, EXPERTS_OF_A_TOKEN, SHARED_EXPERTS, ConfigValues
from qlora.memory.planner.family import AFTER
from qlora.memory.planner.layer_types import FeedType, MixerType
from qlora.memory.planner.mixer_parts import mixer_part
from qlora.memory.planner.shapes import (
    EXPERT_HIDDEN,
    EXPERT_INPUT,
    MLP_HIDDEN,
    MLP_INPUT,
    OTHER_INPUT,
    Experts,
    Layer,
    LayerPart,
    Matrix,
)


def decoder_layer(config: ConfigValues, index: int, mixer: MixerType, feed: FeedType) -> Layer:
    """The layer at an index, which has such a mixer and such a feed-forward part."""
    family = config.family
    recurrent = family.recurrent is not None and (mixer == "recurrent" or family.recurrent.beside_attention)
    mixing = mixer_part(config) if recurrent else None
    attention, attended = attention_part(config, index, mixer) if mixer in ("full", "sliding") else (None, LayerPart())
    experts, routed = _experts(config) if feed == "sparse" else (None, LayerPart())
    mlp, dense = _mlp(config, index, feed)
    inputs, branches = _layer_inputs(config), _alternating(config)
    parts = [attended, routed, dense, inputs, branches]
    wide_norms = _wide_norms(config, mixer, feed)
    wide = config.size("hidden_size") * (2 if family.layer_norm else 1)
    return Layer(
        matrices=tuple(matrix for part in (mixing, *parts) if part for matrix in part.matrices),
        attention=attention,
        recurrent=mixing.recurrent if mixing else None,
        mlp=mlp,
        mlp_kept=family.mlp_kept or (2 if family.gated else 1),
        experts=experts,
        wide_norms=wide_norms,
        norms=len(wide_norms) * wide + sum(part.norms for part in (mixing, *parts) if part),
        others=sum(part.others for part in (mixing, *parts) if part),
        parallel=family.layer_norm and not family.sequential and bool(config.text.get("use_parallel_residual", True)),
        norms_after=wide_norms == AFTER,
        kept=_kept_values(config, feed),
        streams=config.size("altup_num_inputs") if family.alternating else 1,
    )


def _wide_norms(config: ConfigValues, mixer: MixerType, feed: FeedType) -> tuple[str, ...]:
    """Names of the norms over the hidden size."""
    family = config.family
    if family.recurrent and family.recurrent.kind == "delta_split":  # OLMo hybrid: linear layers have norms before
        return ("input_layernorm", "post_attention_layernorm") if mixer == "recurrent" else family.wide_norms
    if family.experts and family.experts.beside_dense and feed == "sparse":
        more = ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2")
        return (*family.wide_norms, *more)
    return family.wide_norms


def _mlp(config: ConfigValues, index: int, feed: FeedType) -> tuple[int, LayerPart]:
    """The dense MLP of a layer, or the shared experts of a sparse one: its width, and its matrices."""
    family, form = config.family, config.family.experts
    width = _dense_width(config, index)
    if feed == "none":
        return 0, LayerPart()
    if feed == "dense" or (form is not None and form.beside_dense):
        return width, LayerPart(_mlp_matrices(config, family.mlp_module, width), 0, family.activation_values)
    assert form is not None
    if not form.shared:
        return 0, LayerPart()
    shared = _shared_width(config)
    if not shared:
        return 0, LayerPart()
    module = family.mlp_module if form.shared == family.mlp_module else f"{form.module}.{form.shared}"
    gate = config.size("hidden_size") if form.shared_gate else 0
    return shared, LayerPart(_mlp_matrices(config, module, shared), 0, gate)


def _shared_width(config: ConfigValues) -> int:
    """Features inside the shared experts together."""
    form = config.family.experts
    assert form is not None
    if form.shared_width:
        return config.size(form.shared_width, least=0)
    count = config.get(*SHARED_EXPERTS)
    count = count[0] if isinstance(count, list) else count
    return (count or 0) * config.layer_size(form.width, 0)


def _dense_width(config: ConfigValues, index: int) -> int:
    """Features inside a dense MLP; LFM2 adjusts them, Gemma 4 doubles them in layers that share keys and values."""
    key = config.family.mlp_width
    if config.get(key) is None:
        return 0
    width = config.layer_size(key, index)
    if config.get("block_auto_adjust_ff_dim"):
        multiple, factor = config.size("block_multiple_of"), config.get("block_ffn_dim_multiplier")
        width = int((factor or 1.0) * int(2 * width / 3))
        width = -(-width // multiple) * multiple if factor is not None else width
    shared = config.size("num_kv_shared_layers", default=0, least=0)
    doubled = config.enabled("use_double_wide_mlp") and index >= config.size("num_hidden_layers") - shared
    return 2 * width if doubled else width


def _mlp_matrices(config: ConfigValues, module: str, width: int) -> tuple[Matrix, ...]:
    """Gate, up and down; gate and up may be one matrix, or there is no gate."""
    family, hidden, bias = config.family, config.size("hidden_size"), config.enabled(config.family.mlp_bias)
    *ups, down = family.mlp
    out_features = 2 * width if family.gated and len(ups) == 1 else width
    return (
        *(Matrix(f"{module}.{name}", out_features, hidden, bias, MLP_INPUT) for name in ups),
        Matrix(f"{module}.{down}", hidden, width, bias, MLP_HIDDEN),
    )


def _experts(config: ConfigValues) -> tuple[Experts, LayerPart]:
    """The stacks of experts, and their router's values."""
    form, hidden = config.family.experts, config.size("hidden_size")
    assert form is not None
    count, width = config.size(*EXPERT_COUNT), config.layer_size(form.width, 0)
    visits = config.get(*EXPERTS_OF_A_TOKEN)
    per_token = visits[0] if isinstance(visits, list) else config.size(*EXPERTS_OF_A_TOKEN)
    path = f"{form.module}.experts." if form.module else "experts."
    name, rows = ("gate_up_proj", 2 * width) if form.gated else ("up_proj", width)
    matrices = (
        Matrix(f"{path}{name}", rows, hidden, form.bias, EXPERT_INPUT, count),
        Matrix(f"{path}down_proj", hidden, width, form.bias, EXPERT_HIDDEN, count),
    )
    router = count * (hidden + form.router_values) + (hidden if form.beside_dense else 0)
    return Experts(count, per_token, width, form.kept or (3 if form.gated else 2)), LayerPart(matrices, 0, router)


def _kept_values(config: ConfigValues, feed: FeedType) -> int:
    """Values per token around a gate on the shared experts, and around an embedding that every layer reads."""
    form, hidden, width = config.family.experts, config.size("hidden_size"), layer_input_width(config)
    gated = form is not None and form.shared_gate and feed == "sparse"
    return 2 * hidden * gated + 3 * (hidden + width) * (width > 0)


def _layer_inputs(config: ConfigValues) -> LayerPart:
    """The gate and the projection of an embedding that every layer reads."""
    width = layer_input_width(config)
    if not width:
        return LayerPart()
    hidden = config.size("hidden_size")
    return LayerPart(
        (
            Matrix("per_layer_input_gate", width, hidden, False, OTHER_INPUT),
            Matrix("per_layer_projection", hidden, width, False, OTHER_INPUT),
        ),
        hidden,
    )


def layer_input_width(config: ConfigValues) -> int:
    """Features of the embedding that every layer reads; 0 without it."""
    return config.size("hidden_size_per_layer_input", default=0, least=0) if config.family.layer_inputs else 0


def _alternating(config: ConfigValues) -> LayerPart:
    """Gemma 3n: predicted and corrected streams (arXiv:2301.13310), and a low-rank branch (arXiv:2411.07501)."""
    if not config.family.alternating:
        return LayerPart()
    hidden, streams, rank = (config.size(key) for key in ("hidden_size", "altup_num_inputs", "laurel_rank"))
    return LayerPart(
        (
            Matrix("altup.modality_router", streams, hidden, False, OTHER_INPUT),
            Matrix("laurel.linear_left", rank, hidden, False, OTHER_INPUT),
            Matrix("laurel.linear_right", hidden, rank, False, OTHER_INPUT),
        ),
        2 * hidden,
        streams**2 + streams**3 + hidden,
    )
