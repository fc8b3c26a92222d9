"""llama.cpp's name for how a byte-level BPE tokenizer splits text: `tokenizer.ggml.pre`, known by the split expression.

llama.cpp holds the expressions of each name in its code (src/llama-vocab.cpp), so a vocabulary of any size works, while
its converter knows whole vocabularies by a hash.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.errors import InputError
from qlora.exporters.gguf.gguf_architectures import OTHER_WAY

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_SHORT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SINGLE_DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ENDINGS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{ENDINGS}"
QWEN2 = rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{ENDINGS}"
QWEN35 = (
    rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4O = rf"{CASED}{ENGLISH}?|{UPPER}{ENGLISH}?|\p{{N}}{{1,3}}|{SLASHED}"
TEKKEN = rf"{CASED}|{UPPER}|\p{{N}}|{SLASHED}"
DIGITS = "digits one by one"


@dataclass(frozen=True)
class SplitRule:
    """A name of llama.cpp's, and the steps that it means."""

    name: str
    steps: tuple[str, ...]
    ignores_merges: bool | None = None  # whether a word that is a token is taken whole; None: both have this name
    single_white_space: bool = False  # equal only where no token holds several white space characters


# Two blanks before a digit: `smollm` keeps them together, SINGLE_DIGITS splits the last one off.
SPLIT_RULES = (
    SplitRule("gpt-2", (GPT2,), False),
    SplitRule("gpt-2", (GPT2_SHORT,), False),
    SplitRule("llama-bpe", (LLAMA3,), True),
    SplitRule("smaug-bpe", (LLAMA3,), False),
    SplitRule("qwen2", (QWEN2,), False),
    SplitRule("qwen35", (QWEN35,), False),
    SplitRule("gpt-4o", (GPT4O,)),
    SplitRule("tekken", (TEKKEN,), True),
    SplitRule("smollm", (DIGITS, GPT2), False),
    SplitRule("smollm", (SINGLE_DIGITS,), False, single_white_space=True),
)


def find_split_rule(tokenizer: Mapping[str, Any]) -> SplitRule:
    """The rule of a byte-level tokenizer's JSON. InputError, naming the expression, if llama.cpp has none."""
    steps, ignores = _steps(tokenizer["pre_tokenizer"]), bool(tokenizer["model"].get("ignore_merges"))
    for rule in SPLIT_RULES:
        if rule.steps == steps and rule.ignores_merges in (None, ignores):
            if rule.single_white_space and _has_white_space_runs(tokenizer["model"]["vocab"]):
                continue
            return rule
    expression = " then ".join(steps)
    raise InputError(
        f"--to gguf: llama.cpp has no name for this tokenizer's split expression, {expression!r}"
        f"{' (ignore_merges)' if ignores else ''}, so that it would read other tokens. {OTHER_WAY}"
    )


def rule_named(name: str) -> SplitRule | None:
    """The first rule of a name in a file; None for one that is not in the table."""
    return next((rule for rule in SPLIT_RULES if rule.name == name), None)


def is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer's JSON is BPE over bytes."""
    return any(part.get("type") == "ByteLevel" for part in _parts(tokenizer["pre_tokenizer"]))


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    steps = []
    for part in _parts(pre_tokenizer):
        kind, pattern = part.get("type"), part.get("pattern") or {}
        if kind == "Split" and "Regex" in pattern and _isolates(part):
            steps.append(str(pattern["Regex"]))
        elif kind == "Digits" and part.get("individual_digits"):
            steps.append(DIGITS)
        elif kind == "ByteLevel" and not part.get("add_prefix_space"):
            steps += [GPT2] if part.get("use_regex", True) else []
        else:
            steps.append(json.dumps(part, ensure_ascii=False))
    return tuple(steps)


def _isolates(split: Mapping[str, Any]) -> bool:
    """Whether every match is a part of its own: `Removed` with `invert` is the same where all text matches."""
    if split.get("behavior") == "Removed":
        return bool(split.get("invert")) and str(split["pattern"]["Regex"]).endswith(r"|\s+")
    return split.get("behavior") == "Isolated" and not split.get("invert")


def _parts(pre_tokenizer: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    if not pre_tokenizer:
        return ()
    return pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else (pre_tokenizer,)


def _has_white_space_runs(vocabulary: Mapping[str, int]) -> bool:
    """Whether a token holds several white space characters and nothing else."""
    alphabet = byte_alphabet()
    for token in vocabulary:
        if len(token) > 1 and all(char in alphabet for char in token):
            text = bytes(alphabet[char] for char in token).decode(errors="replace")
            if len(text) > 1 and text.isspace():
                return True
    return False


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2): printable ones are themselves, the others U+0100 and on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + number): byte for number, byte in enumerate(others)}
