"""The architectures that are written as GGUF, one line each: transformers' class -> llama.cpp's name and differences.

Facts are llama.cpp's (src/models/*.cpp and conversion/*.py): which rows its rotary embedding wants side by side, what
its norms have added, what its graph takes from metadata, and what it computes in one way only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from qlora.errors import InputError

SILU, GELU, GELU_TANH = "silu", "gelu", "gelu_pytorch_tanh"
OTHER_WAY: Final = "Use --llama-cpp DIR (a checkout of llama.cpp), or --to merged."
RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
WINDOW = {"attention.sliding_window": "sliding_window"}
SCALES = {
    "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
}  # fmt: skip
EXPERTS = {
    "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}  # fmt: skip
OSS_EXPERTS = EXPERTS | {"expert_count": "num_local_experts", "expert_feed_forward_length": "intermediate_size"}
NEOX = {"attention.layer_norm_epsilon": "layer_norm_eps", "use_parallel_residual": "use_parallel_residual"}
ROPE_SCALINGS = ("default", "linear", "yarn")


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp's form of an architecture differs from transformers'."""

    name: str  # llama.cpp's
    permutes_heads: bool = False  # rows of q_proj and k_proj: the two halves of a head alternate
    splits_heads: bool = False  # rows of a fused qkv: head by head in transformers, q, k, v one after another here
    alternates_gate: bool = False  # rows of gate and up alternate in transformers' experts, else they are halves
    norm_shift: float = 0.0  # added to every norm's weight
    keys: Mapping[str, str] = field(default_factory=lambda: RMS)  # key -> attribute of the configuration
    activation: str = SILU  # the only one that the graph has
    rope_scalings: tuple[str, ...] = ROPE_SCALINGS
    sliding_every: int = 0  # all layers but every n-th see a window; 0: no layer does
    heads_scale_layers: int = 0  # with so many layers attention scales by embedding / heads, else by the head size
    always_has_head: bool = False  # the head is stored even if it is the embedding
    has_head: bool = True  # False: the head is always the embedding

    def check(self, config: Any) -> None:
        """InputError if llama.cpp would compute another model than `config` says."""
        for problem in (
            self._activation(config), self._rope(config), self._window(config), self._scale(config), _experts(config),
        ):  # fmt: skip
            if problem:
                raise InputError(f"--to gguf: llama.cpp's {self.name} {problem}. {OTHER_WAY}")

    def _activation(self, config: Any) -> str:
        names = ("hidden_activation", "hidden_act")
        actual = next(value for value in (getattr(config, name, None) for name in names) if value is not None)
        return "" if actual == self.activation else f"has the activation {self.activation}, this model {actual}"

    def _rope(self, config: Any) -> str:
        kinds = {str(rope.get("rope_type", "default")) for rope in rope_sections(config).values()}
        unknown = sorted(kinds - set(self.rope_scalings))
        step = getattr(config, "no_rope_layers", None)
        if self.name == "smollm3" and list(step or ()) != [int((i + 1) % 4 != 0) for i in range(len(step or ()))]:
            return "leaves out the rotary embedding in every fourth layer, this model in others"
        return f"has no rotary embedding of kind {unknown[0]}" if unknown else ""

    def _window(self, config: Any) -> str:
        window, context = getattr(config, "sliding_window", None), config.max_position_embeddings
        types = list(getattr(config, "layer_types", None) or [])
        if not self.sliding_every:
            slides = "sliding_attention" in types if types else bool(window)
            if slides and window and window < context:
                return f"has no sliding window: this model's is {window} of {context} tokens"
            return ""
        expected = [(i + 1) % self.sliding_every != 0 for i in range(config.num_hidden_layers)]
        if [kind == "sliding_attention" for kind in types] != expected:
            return f"has full attention in one layer of {self.sliding_every}, the last, this model's layer_types differ"
        return ""

    def _scale(self, config: Any) -> str:
        scalar = getattr(config, "query_pre_attn_scalar", None)
        if scalar is None:
            return ""
        by_heads = config.num_hidden_layers == self.heads_scale_layers
        expected = config.hidden_size // config.num_attention_heads if by_heads else head_size(config)
        return "" if scalar == expected else f"scales attention by {expected}**-0.5, this model by {scalar}**-0.5"


def _experts(config: Any) -> str:
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        return "has experts in every layer, this model has layers without"
    return "" if getattr(config, "norm_topk_prob", True) else "weighs experts by a sum of 1, this model does not"


def head_size(config: Any) -> int:
    """Values of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_sections(config: Any) -> dict[str, dict[str, Any]]:
    """Parameters of the rotary embedding by kind of layer; "" where all layers have the same."""
    rope = dict(config.rope_parameters)
    nested = {kind: dict(part) for kind, part in rope.items() if isinstance(part, Mapping)}
    return nested or {"": rope}


_LLAMA = Architecture("llama", permutes_heads=True, rope_scalings=(*ROPE_SCALINGS, "llama3"))
_GEMMA3 = Architecture(
    "gemma3", norm_shift=1.0, activation=GELU_TANH, sliding_every=6, heads_scale_layers=62,
    keys=RMS | WINDOW | {"final_logit_softcapping": "final_logit_softcapping"},
)  # fmt: skip
ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Gemma2ForCausalLM": Architecture(
        "gemma2", norm_shift=1.0, activation=GELU_TANH, sliding_every=2, heads_scale_layers=46, has_head=False,
        keys=RMS | WINDOW | CAPS,
    ),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": _GEMMA3,
    "Phi3ForCausalLM": Architecture("phi3", rope_scalings=("default",)),
    "GraniteForCausalLM": Architecture("granite", permutes_heads=True, keys=RMS | SCALES),
    "SmolLM3ForCausalLM": Architecture("smollm3", permutes_heads=True),
    "GPTNeoXForCausalLM": Architecture(
        "gptneox", splits_heads=True, activation=GELU, keys=NEOX, always_has_head=True, rope_scalings=("default",)
    ),
    "Qwen3MoeForCausalLM": Architecture("qwen3moe", keys=RMS | EXPERTS),
    "GptOssForCausalLM": Architecture(
        "gpt-oss", alternates_gate=True, keys=RMS | WINDOW | OSS_EXPERTS, always_has_head=True, sliding_every=2
    ),
}  # fmt: skip


def architecture_of(model: Any) -> Architecture:
    """The line of a model's class, checked against its configuration. InputError where there is none or it differs."""
    name = type(model).__name__
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise InputError(
            f"--to gguf: {name} is not among the architectures that are written here ({known}). {OTHER_WAY}"
        )
    ARCHITECTURES[name].check(model.config.get_text_config())
    return ARCHITECTURES[name]
