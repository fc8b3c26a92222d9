"""Workloads of the benchmarks: random base models, saved once, and random examples that are the same for everyone."""

from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "30M": {
        "vocab_size": 32_000, "hidden_size": 384, "intermediate_size": 1_024, "num_hidden_layers": 8,
        "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 4_096,
        "tie_word_embeddings": True,
    },
    "100M": {
        "vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2_048, "num_hidden_layers": 12,
        "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 4_096,
        "tie_word_embeddings": True,
    },
    "250M": {
        "vocab_size": 32_000, "hidden_size": 1_024, "intermediate_size": 2_816, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 4_096,
        "tie_word_embeddings": True,
    },
    "moe": {  # 90 million parameters, 16 experts of which a token visits 4
        "model_type": "qwen3_moe", "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1_408,
        "moe_intermediate_size": 384, "num_experts": 16, "num_experts_per_tok": 4, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4_096,
        "tie_word_embeddings": True,
    },
    "hybrid": {  # 40 million parameters, Gated DeltaNet in three layers of four
        "model_type": "qwen3_5_text", "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1_408,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
        "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 64,
        "linear_value_head_dim": 64, "max_position_embeddings": 4_096, "tie_word_embeddings": True,
    },
    "8B": {
        "vocab_size": 128_256, "hidden_size": 4_096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8_192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, LEARNING_RATE = 16, 32, 2e-4
WORDS = 32_000  # token ids used, for every vocabulary
END, PAD = "<end>", "<pad>"  # tokens 1 and 2
MEDIAN_TOKENS, SPREAD = 100, 1.0  # of short examples: lognormal, as in an instruction data set


def make_base(folder: Path, shape: str, device: str) -> None:
    """Save a random bfloat16 model, created on `device`, with a tokenizer that TRL can load."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    if (folder / "tokenizer.json").exists():
        return
    torch.manual_seed(0)
    with torch.device(device):
        config = AutoConfig.for_model(**{"model_type": "llama", **SHAPES[shape]})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = {f"w{number}": number for number in range(WORDS)} | {END: 1, PAD: 2}
    del words["w1"], words["w2"]
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD).save_pretrained(folder)


def token_lists(count: int, length: int, short: bool) -> list[list[int]]:
    """`count` lists of random tokens: `length` each, or with an instruction data set's lengths, `length` at most."""
    import numpy as np

    rng = np.random.default_rng(1)
    lengths = [length] * count
    if short:
        lognormal = rng.lognormal(np.log(MEDIAN_TOKENS), SPREAD, count).astype(int)
        lengths = np.clip(lognormal, 8, length).tolist()
    return [rng.integers(3, WORDS, tokens).tolist() for tokens in lengths]
