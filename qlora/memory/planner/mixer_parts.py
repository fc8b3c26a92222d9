"""Recurrent mixers: their matrices, their 16-bit values, and what they keep for backward in transformers' torch code.

Gated DeltaNet (arXiv:2412.06464), Kimi Delta Attention (arXiv:2510.26692), Mamba (arXiv:2312.00752), Mamba-2
(arXiv:2405.21060), and LFM2's short convolution. Kept values are counted for transformers' own torch formulas.
"""

from collections.abc import Callable
from typing import NamedTuple

from qlora.memory.planner.config_values import ConfigValues
from qlora.memory.planner.shapes import MIXER_INPUT, MIXER_OUTPUT, OTHER_INPUT, Matrix, Recurrent


class MixerPart(NamedTuple):
    """A recurrent mixer of one layer."""

    matrices: tuple[Matrix, ...]
    recurrent: Recurrent
    norms: int = 0  # values of its own norms
    others: int = 0  # values that stay in 16 bits


def mixer_part(config: ConfigValues) -> MixerPart:
    """The recurrent mixer of a family's hybrid layers."""
    form = config.family.recurrent
    assert form is not None
    return _KINDS[form.kind](config, form.module)


def _linear(module: str, name: str, out_features: int, in_features: int, bias: bool = False) -> Matrix:
    """A projection of the layer's input."""
    return Matrix(f"{module}.{name}", out_features, in_features, bias, MIXER_INPUT)


def _output(module: str, name: str, out_features: int, in_features: int, bias: bool = False) -> Matrix:
    """The projection of the mixer's result."""
    return Matrix(f"{module}.{name}", out_features, in_features, bias, MIXER_OUTPUT)


class _DeltaSizes(NamedTuple):
    key: int
    value: int
    heads: int  # of values
    value_dim: int
    kernel: int


def _delta_sizes(config: ConfigValues) -> _DeltaSizes:
    heads, value_dim = config.size("linear_num_value_heads"), config.size("linear_value_head_dim")
    key = config.size("linear_num_key_heads") * config.size("linear_key_head_dim")
    return _DeltaSizes(key, heads * value_dim, heads, value_dim, config.size("linear_conv_kernel_dim"))


DELTA_CHUNK = 64  # tokens of a chunk in transformers' torch formula


def _delta_activations(config: ConfigValues, sizes: _DeltaSizes) -> Recurrent:
    """Gated delta rule in chunks: float32 copies of query, key and value of every value head, and chunk products."""
    wide_key = sizes.heads * config.size("linear_key_head_dim")  # keys are repeated for every value head
    state = wide_key * sizes.value_dim // DELTA_CHUNK  # one state a chunk
    return Recurrent(
        kept=2 * (2 * sizes.key + sizes.value) + 2 * sizes.value,
        kept_float32=12 * wide_key + 5 * sizes.value + (5 * DELTA_CHUNK + 16) * sizes.heads + 2 * state,
        working=4 * wide_key + 3 * sizes.value + 2 * DELTA_CHUNK * sizes.heads,
    )


def _delta(config: ConfigValues, module: str) -> MixerPart:
    hidden, sizes = config.size("hidden_size"), _delta_sizes(config)
    names = {"in_proj_qkv": 2 * sizes.key + sizes.value, "in_proj_z": sizes.value}
    names |= {"in_proj_b": sizes.heads, "in_proj_a": sizes.heads}
    if config.family.recurrent and config.family.recurrent.kind == "delta_fused":
        names = {"in_proj_qkvz": 2 * sizes.key + 2 * sizes.value, "in_proj_ba": 2 * sizes.heads}
    matrices = (
        *(_linear(module, name, out_features, hidden) for name, out_features in names.items()),
        _output(module, "out_proj", hidden, sizes.value),
    )
    others = 2 * sizes.heads + (2 * sizes.key + sizes.value) * sizes.kernel
    return MixerPart(matrices, _delta_activations(config, sizes), sizes.value_dim, others)


def _delta_split(config: ConfigValues, module: str) -> MixerPart:
    hidden, sizes = config.size("hidden_size"), _delta_sizes(config)
    names = {"q_proj": sizes.key, "k_proj": sizes.key, "v_proj": sizes.value}
    names |= {"a_proj": sizes.heads, "b_proj": sizes.heads, "g_proj": sizes.value}
    matrices = (
        *(_linear(module, name, out_features, hidden) for name, out_features in names.items()),
        _output(module, "o_proj", hidden, sizes.value),
    )
    others = 2 * sizes.heads + (2 * sizes.key + sizes.value) * sizes.kernel
    return MixerPart(matrices, _delta_activations(config, sizes), sizes.value_dim, others)


def _kda(config: ConfigValues, module: str) -> MixerPart:
    hidden, heads = config.size("hidden_size"), config.size("linear_num_heads")
    head_dim = config.size("linear_head_dim")
    wide = heads * head_dim
    matrices = (
        *(_linear(module, name, wide, hidden) for name in ("q_proj", "k_proj", "v_proj")),
        _linear(module, "forget_gate.f_a_proj", head_dim, hidden),
        Matrix(f"{module}.forget_gate.f_b_proj", wide, head_dim, False, OTHER_INPUT),
        _linear(module, "b_proj", heads, hidden),
        _linear(module, "g_a_proj", head_dim, hidden),
        Matrix(f"{module}.g_b_proj", wide, head_dim, False, OTHER_INPUT),
        _output(module, "o_proj", hidden, wide),
    )
    sizes = _DeltaSizes(wide, wide, heads, head_dim, config.size("linear_conv_kernel_dim"))
    state = wide * head_dim // DELTA_CHUNK
    pairs = 3 * DELTA_CHUNK * wide  # decays of every pair of a chunk's tokens, for every feature
    inverse = DELTA_CHUNK**2 * heads // 3  # rows of the inverse by forward substitution, copied each time
    kept = Recurrent(12 * wide, pairs + inverse + 17 * wide + 5 * DELTA_CHUNK * heads + 2 * state, pairs)
    return MixerPart(matrices, kept, head_dim, wide + heads + 3 * wide * sizes.kernel)


def _mamba2(config: ConfigValues, module: str) -> MixerPart:
    """Mamba-2, with a norm before its last product unless config.json turns it off."""
    hidden, heads = config.size("hidden_size"), config.size("mamba_n_heads", "mamba_num_heads")
    inner = _mamba2_inner(config, hidden, heads)
    groups, state = config.size("mamba_n_groups", "n_groups"), config.size("mamba_d_state", "ssm_state_size")
    kernel = config.size("mamba_d_conv", "conv_kernel")
    convolved = inner + 2 * groups * state
    in_bias, out_bias = (config.enabled(key) for key in ("mamba_proj_bias", _out_bias_key(config)))
    conv_bias = config.get("mamba_conv_bias", "use_conv_bias") is not False
    matrices = (
        _linear(module, "in_proj", inner + convolved + heads, hidden, in_bias),
        _output(module, "out_proj", hidden, inner, out_bias),
    )
    others = 3 * heads + convolved * (kernel + conv_bias)
    chunk = config.size("mamba_chunk_size", "chunk_size")
    kept = Recurrent(
        kept=inner + 3 * convolved + heads,
        kept_float32=7 * inner + 5 * heads * (state + 1) + 3 * heads * chunk + 2 * inner * state // chunk,
        working=2 * inner + 2 * heads * state + heads * chunk,
    )
    norm = 0 if config.get("mamba_rms_norm") is False else inner
    return MixerPart(matrices, kept, norm, others)


def _out_bias_key(config: ConfigValues) -> str:
    return "projectors_bias" if config.get("projectors_bias") is not None else "mamba_proj_bias"


def _mamba2_inner(config: ConfigValues, hidden: int, heads: int) -> int:
    """Features of all heads together: set, heads times their size, or `expand` times the hidden size."""
    if config.get("mamba_num_heads") is not None:
        return heads * config.size("mamba_head_dim")
    if config.get("mamba_d_ssm") is not None:
        return config.size("mamba_d_ssm")
    return config.size("mamba_expand") * hidden


def _mamba(config: ConfigValues, module: str) -> MixerPart:
    """Mamba with norms of its inner projections (Jamba): its `dt_proj` is left in 16 bits."""
    hidden, state = config.size("hidden_size"), config.size("mamba_d_state")
    inner, kernel = config.size("mamba_expand") * hidden, config.size("mamba_d_conv")
    rank = config.get("mamba_dt_rank")
    rank = -(-hidden // 16) if rank in (None, "auto") else config.size("mamba_dt_rank")
    bias = config.enabled("mamba_proj_bias")
    matrices = (
        _linear(module, "in_proj", 2 * inner, hidden, bias),
        Matrix(f"{module}.x_proj", rank + 2 * state, inner, False, OTHER_INPUT),
        _output(module, "out_proj", hidden, inner, bias),
    )
    conv_bias = config.get("mamba_conv_bias") is not False
    others = inner * state + inner + inner * (kernel + conv_bias) + inner * rank + inner
    kept = Recurrent(kept=8 * inner, kept_float32=3 * inner * state + 2 * inner, working=2 * inner * state)
    return MixerPart(matrices, kept, rank + 2 * state, others)


def _conv(config: ConfigValues, module: str) -> MixerPart:
    """LFM2's short convolution between two gates."""
    hidden, kernel = config.size("hidden_size"), config.size("conv_L_cache")
    bias = config.enabled("conv_bias")
    matrices = (
        _linear(module, "in_proj", 3 * hidden, hidden, bias),
        _output(module, "out_proj", hidden, hidden, bias),
    )
    kept = Recurrent(kept=6 * hidden, kept_float32=0, working=hidden)
    return MixerPart(matrices, kept, 0, hidden * (kernel + bias))


_KINDS: dict[str, Callable[[ConfigValues, str], MixerPart]] = {
    "delta": _delta, "delta_fused": _delta, "delta_split": _delta_split, "kda": _kda,
    "mamba": _mamba, "mamba2": _mamba2, "conv": _conv,
}  # fmt: skip
