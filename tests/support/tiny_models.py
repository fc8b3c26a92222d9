"""Tiny random models of every supported architecture, saved in transformers' format."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers import models as zoo

VOCABULARY = 384
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA = {"num_key_value_heads": 2, "head_dim": 16}
FAMILIES: dict[str, Any] = {
    "llama": lambda: zoo.llama.LlamaConfig(**COMMON, **GQA),
    "llama-tied-bias": lambda: zoo.llama.LlamaConfig(
        **COMMON, **GQA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "mistral": lambda: zoo.mistral.MistralConfig(**COMMON, **GQA, sliding_window=32),
    "qwen2": lambda: zoo.qwen2.Qwen2Config(**COMMON, num_key_value_heads=2),
    "qwen3": lambda: zoo.qwen3.Qwen3Config(**COMMON, **GQA),
    "gemma2": lambda: zoo.gemma2.Gemma2Config(**COMMON, **GQA, query_pre_attn_scalar=16, sliding_window=32),
    "gemma3": lambda: zoo.gemma3.Gemma3TextConfig(**COMMON, **GQA, query_pre_attn_scalar=16, sliding_window=32),
    "phi3": lambda: zoo.phi3.Phi3Config(**COMMON, num_key_value_heads=2),
    "gpt_neox": lambda: zoo.gpt_neox.GPTNeoXConfig(**COMMON),
    "granite": lambda: zoo.granite.GraniteConfig(**COMMON, num_key_value_heads=2, logits_scaling=4.0),
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_model(folder: Path, family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Write a random model of `family` and a byte tokenizer with a ChatML template to `folder`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token per byte and five control tokens; needs no download."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    control = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate([*control, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "</s>"],
    )  # fmt: skip
    fast.chat_template = chat_template
    return fast
