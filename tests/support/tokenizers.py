"""Small tokenizers of every kind, built in memory, and chat templates for them."""

import re
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from support.paths import TEMPLATES

CORPUS = ["the quick brown fox jumps over a lazy dog", "Hello there, how are you?", "1 + 2 = 3\n\n\nThat is right."] * 8

CONTROL_TOKENS = {  # of each template; those with a ! are not special tokens
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": ["[INST]", "[/INST]"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "qwen3": ["<|im_start|>", "<|im_end|>", "!<think>", "!</think>", "!<tool_call>", "!</tool_call>"],
    "phi": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "forced_thinking": ["<|User|>", "<|Assistant|>", "!<think>", "!</think>"],
}
END_TOKENS = {  # of an answer
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "qwen3": "<|im_end|>",
    "phi": "<|end|>",
    "forced_thinking": "</s>",
    "plain": "</s>",
}
FAMILIES = [  # template and kind of tokenizer, as released models combine them
    ("chatml", "bytes"),
    ("llama3", "bytes_bos"),
    ("mistral", "pieces"),
    ("mistral", "pieces_first"),
    ("gemma", "gemma_like"),
    ("qwen3", "bytes"),
    ("phi", "pieces"),
    ("plain", "bytes"),
    ("plain", "pieces"),
    ("plain", "unigram"),
]


def without_whitespace(text: str) -> str:
    return "".join(text.split())


_SPECIAL = re.compile(r"<\|[\w/]+\|>|<｜[^>\s]+｜>|<\|[a-z_]+>|<[a-z_]+\|>|<(?:start|end)_of_turn>|</?s>|\[/?INST\]")
_TAGS = re.compile(r"</?(?:think|tool_call|tool_response)>")


def tokenizer_for(chat_template: str) -> Any:
    """A byte-level tokenizer with a chat template, and the control tokens that the template writes."""
    backend = Tokenizer.from_str(make_tokenizer("bytes").backend_tokenizer.to_str())
    for pattern, special in ((_SPECIAL, True), (_TAGS, False)):
        tokens = [
            AddedToken(text, special=special, normalized=False) for text in sorted({*pattern.findall(chat_template)})
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(tokens)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = chat_template
    return tokenizer


def template_text(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


@cache
def make_tokenizer(kind: str, template: str = "plain", pad: str = "none") -> Any:
    """A tokenizer of a kind with the control tokens of a template. pad: none, eos or own."""
    backend = BUILDERS[kind]()
    for text in CONTROL_TOKENS.get(template, []):
        token = AddedToken(text.lstrip("!"), special=not text.startswith("!"), normalized=False)
        (backend.add_tokens if text.startswith("!") else backend.add_special_tokens)([token])
    if kind in ("bytes_bos", "pieces", "pieces_first", "gemma_like"):
        bos = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", special_tokens=[bos])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    names |= {"none": {}, "eos": {"pad_token": "</s>"}, "own": {"pad_token": "<pad>"}}[pad]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    if template != "plain":
        tokenizer.chat_template = template_text(template)
    return tokenizer


def _byte_level() -> Tokenizer:
    """GPT-2, Llama-3 and Qwen: bytes first, no space is added before a text."""
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _pieces() -> Tokenizer:
    """Llama-2, legacy: a space is added before every text; bytes where no piece fits."""
    backend = _sentence_pieces()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return backend


def _pieces_first() -> Tokenizer:
    """Llama-2, corrected: a space is added before the first text only."""
    backend = _sentence_pieces()
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _gemma_like() -> Tokenizer:
    """Gemma: pieces, no space is added; two line breaks are one token."""
    backend = _sentence_pieces()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken("\n\n", normalized=False)])
    return backend


def _sentence_pieces() -> Tokenizer:
    letters = [chr(code) for code in range(33, 127)] + ["▁"]
    table = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
    for token in [f"<0x{byte:02X}>" for byte in range(256)] + letters + ["th", "the", "▁the", "ll", "▁a", "er"]:
        table[token] = len(table)
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("l", "l"), ("▁", "a"), ("e", "r")]
    backend = Tokenizer(models.BPE(table, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    return backend


def _unigram() -> Tokenizer:
    """T5: control strings are ordinary pieces of the vocabulary; an end token is added after every text."""
    letters = [chr(code) for code in range(33, 127)] + ["▁", "▁the", "ing", "é"]
    pieces = [("<unk>", 0.0), ("<s>", -1.0), ("</s>", -1.0), ("<pad>", -1.0)]
    scores = [*pieces, *((text, -3.0 - i / 100) for i, text in enumerate(letters)), ("\n", -4.0)]
    backend = Tokenizer(models.Unigram(scores, 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁")
    backend.decoder = decoders.Metaspace("▁")
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    end = ("</s>", backend.token_to_id("</s>"))
    backend.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", special_tokens=[end])
    return backend


BUILDERS = {
    "bytes": _byte_level,
    "bytes_bos": _byte_level,
    "pieces": _pieces,
    "pieces_first": _pieces_first,
    "gemma_like": _gemma_like,
    "unigram": _unigram,
}
