"""Small tokenizers of every kind, built in memory, and the chat templates that go with them."""

from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from support.paths import TEMPLATES

WORDS = ["the quick brown fox jumps over a lazy dog", "Hello there, how are you?", "1 + 2 = 3\n\n\nThat is right."] * 8

MARKS = {  # template: the tokens it is written with; those with a ! are not special
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": ["[INST]", "[/INST]"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "qwen3": ["<|im_start|>", "<|im_end|>", "!<think>", "!</think>", "!<tool_call>", "!</tool_call>"],
    "phi": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "forced_thinking": ["<|User|>", "<|Assistant|>", "!<think>", "!</think>"],
}
ENDS = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "qwen3": "<|im_end|>",
    "phi": "<|end|>",
    "forced_thinking": "</s>",
    "plain": "</s>",
}
KINDS = ("bytes", "bytes_bos", "pieces", "pieces_first", "gemma_like", "unigram")
FAMILIES = [  # template, kind of tokenizer: as they go together in the wild
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


def template_text(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


@cache
def tokenizer_of(kind: str, template: str = "plain", pad: str = "none") -> Any:
    """A tokenizer of a kind with the marks of a template; pad: none, eos or own."""
    backend = BUILDERS[kind]()
    for mark in MARKS.get(template, []):
        token = AddedToken(mark.lstrip("!"), special=not mark.startswith("!"), normalized=False)
        (backend.add_tokens if mark.startswith("!") else backend.add_special_tokens)([token])
    if kind in ("bytes_bos", "pieces", "pieces_first", "gemma_like"):
        bos = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", special_tokens=[bos])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    names |= {"none": {}, "eos": {"pad_token": "</s>"}, "own": {"pad_token": "<pad>"}}[pad]
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    if template != "plain":
        made.chat_template = template_text(template)
    return made


def _byte_level() -> Tokenizer:
    """GPT-2, Llama-3 and Qwen: bytes first, no space put before a text."""
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], show_progress=False
    )
    backend.train_from_iterator(WORDS, trainer)
    return backend


def _pieces() -> Tokenizer:
    """Llama-2 of old: a space before every text, bytes where no piece fits."""
    backend = _sentence_pieces()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return backend


def _pieces_first() -> Tokenizer:
    """Llama-2 as it should be: a space before the first text only."""
    backend = _sentence_pieces()
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _gemma_like() -> Tokenizer:
    """Gemma: pieces, and no space put anywhere; a run of line ends is one token."""
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
    """T5 and friends: control strings are pieces of the vocabulary like any other; an end token after every text."""
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
