"""The table of architectures: model_type of config.json -> how its decoder layers are built.

Each is tested against transformers' model. A wrapper checkpoint (an image model, say) is planned as its text model.
"""

from collections.abc import Mapping

from qlora.memory.planner.dense_families import DENSE
from qlora.memory.planner.family import Family
from qlora.memory.planner.hybrid_families import HYBRID
from qlora.memory.planner.sparse_families import SPARSE

FAMILIES: Mapping[str, Family] = {**DENSE, **SPARSE, **HYBRID}

# model_type of a wrapper -> that of its text model, where `text_config` does not name one.
WRAPPERS: Mapping[str, str] = {
    "gemma3": "gemma3_text", "gemma3n": "gemma3n_text", "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text", "mistral3": "mistral", "mistral4": "mistral4",
    "llava": "llama", "internvl": "qwen2", "qwen3_vl": "qwen3", "qwen3_vl_moe": "qwen3_moe", "qwen2_5_vl": "qwen2",
    "qwen2_vl": "qwen2", "smolvlm": "llama", "lfm2_vl": "lfm2", "idefics3": "llama", "glm4v": "glm4",
    "glm4v_moe": "glm4_moe", "glm46v": "glm4_moe", "exaone4_5": "exaone4", "aya_vision": "cohere2",
}  # fmt: skip
# Wrappers whose head is tied to the embedding unless their config.json says otherwise.
TIED = frozenset({"gemma3", "gemma3n", "gemma4", "gemma4_unified", "mistral3", "internvl", "lfm2_vl", "aya_vision"})
# Wrappers for which transformers' class for text is built, with paths of a plain text model.
TEXT_CLASSES = frozenset({"qwen3_5", "qwen3_5_moe"})
# model_type of a text model that is built as another one.
SAME: Mapping[str, str] = {
    "qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe", "qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2",
    "glm4v_text": "glm4", "glm4v_moe_text": "glm4_moe",
}  # fmt: skip
