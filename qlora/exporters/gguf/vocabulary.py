"""A tokenizer as GGUF metadata: byte-level BPE, or sentencepiece's BPE with pieces and scores.

Read from the tokenizer that transformers builds, which is the one of training: a folder's tokenizer.json,
tokenizer.model and added tokens have been joined there.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.errors import InputError
from qlora.exporters.gguf.gguf_architectures import OTHER_WAY
from qlora.exporters.gguf.gguf_file import Value
from qlora.exporters.gguf.split_expressions import find_split_rule, is_byte_level

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens in llama.h
SPACE = "\u2581"  # sentencepiece's blank
NO_MERGES = "[no] [merges]"  # a list must not be empty; this pair is never made, as merges start from single characters
STOP_ROLES = ("eos", "eot", "eom")  # the tokens at which llama.cpp stops
ADDED_SCORE = -1000.0  # of tokens that are matched as a whole, and never merged
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}


@dataclass(frozen=True)
class Vocabulary:
    """What a file says about text: metadata, and the texts of its tokens."""

    metadata: Mapping[str, Value]
    tokens: tuple[str, ...]


def build_vocabulary(tokenizer: Any, rows: int, stop_ids: Sequence[int], chat_template: str | None) -> Vocabulary:
    """The vocabulary of a transformers tokenizer for an embedding of `rows` rows.

    stop_ids: the tokens that end an answer. InputError for a tokenizer that llama.cpp has no form for.
    """
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    if backend["model"]["type"] != "BPE":
        raise InputError(f"--to gguf: a tokenizer of kind {backend['model']['type']} is not written. {OTHER_WAY}")
    added = {int(token["id"]): token for token in backend["added_tokens"]}
    if is_byte_level(backend):
        metadata, texts, types = _byte_level(backend, added, rows)
    else:
        metadata, texts, types = _sentencepiece(backend, added, rows)
    _refuse_equal_texts(texts)
    metadata |= {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": types}
    metadata |= _special_ids(tokenizer, stop_ids, rows)
    metadata["tokenizer.ggml.add_bos_token"] = adds_bos(tokenizer)
    metadata["tokenizer.ggml.add_eos_token"] = adds_eos(tokenizer)
    if chat_template:
        metadata["tokenizer.chat_template"] = chat_template
    return Vocabulary(metadata, tuple(texts))


def adds_bos(tokenizer: Any) -> bool:
    """Whether a transformers tokenizer puts its beginning-of-text token before a plain text."""
    ids = _ids_around_text(tokenizer)
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def adds_eos(tokenizer: Any) -> bool:
    """Whether a transformers tokenizer puts its end-of-text token after a plain text."""
    ids = _ids_around_text(tokenizer)
    return tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id]


def _ids_around_text(tokenizer: Any) -> list[int]:
    return list(tokenizer("a")["input_ids"])


Parts = tuple[dict[str, Value], list[str], list[int]]


def _byte_level(backend: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]], rows: int) -> Parts:
    normalizer = backend.get("normalizer") or {}
    if normalizer and normalizer.get("type") != "NFC":  # llama.cpp normalizes nothing; most text is NFC already
        raise InputError(
            f"--to gguf: llama.cpp has no normalizer {normalizer.get('type')} for this tokenizer. {OTHER_WAY}"
        )
    rule = find_split_rule(backend)
    texts, types = _texts(backend["model"]["vocab"], added, rows)
    metadata: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule.name,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(backend)] or [NO_MERGES],
    }
    return metadata, texts, types


def _sentencepiece(backend: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]], rows: int) -> Parts:
    """llama.cpp joins the neighbors whose piece has the best score: minus the rank of the first merge that makes it."""
    vocabulary: Mapping[str, int] = backend["model"]["vocab"]
    if not backend["model"].get("byte_fallback") or not BYTES.keys() <= vocabulary.keys():
        raise InputError(
            f"--to gguf: this tokenizer is neither byte-level BPE nor sentencepiece with bytes. {OTHER_WAY}"
        )
    texts, types = _texts(vocabulary, added, rows)
    for text, number in vocabulary.items():
        if text in BYTES:
            types[number] = BYTE
    unknown = vocabulary.get(str(backend["model"].get("unk_token")))
    if unknown is not None:
        types[unknown] = UNKNOWN
    ranks = _piece_ranks(backend, {token["content"] for token in added.values()})
    scores = [float(-ranks[text]) if text in ranks else _score(kind) for text, kind in zip(texts, types, strict=True)]
    metadata: dict[str, Value] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": _adds_blank(backend),
        "tokenizer.ggml.remove_extra_whitespaces": False,
    }
    return metadata, texts, types


def _score(kind: int) -> float:
    return 0.0 if kind in (NORMAL, UNKNOWN, BYTE) else ADDED_SCORE  # single characters are never the outcome of a merge


def _texts(
    vocabulary: Mapping[str, int], added: Mapping[int, Mapping[str, Any]], rows: int
) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding; InputError for a token without a row."""
    texts, types = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
    highest = max([*vocabulary.values(), *added])
    if highest >= rows:
        raise InputError(
            f"--to gguf: the tokenizer has token {highest}, the embedding {rows} rows. Export --to merged."
        )
    for text, number in vocabulary.items():
        texts[number], types[number] = text, NORMAL
    for number, token in added.items():
        texts[number], types[number] = token["content"], CONTROL if token["special"] else USER_DEFINED
    return texts, types


def _merges(backend: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs that are merged, the first to merge first; files hold them as lists, or as texts with a blank."""
    pairs = [
        tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ", 1)) for merge in backend["model"]["merges"]
    ]
    return [(str(left), str(right)) for left, right in pairs]


def _piece_ranks(backend: Mapping[str, Any], added: set[str]) -> dict[str, int]:
    """Piece -> its place among all that merges make. InputError if merges are not what pieces and scores can say."""
    vocabulary: Mapping[str, int] = backend["model"]["vocab"]
    merges = _merges(backend)
    ranks: dict[str, int] = {}
    last = ""
    for left, right in merges:
        piece = left + right
        if piece != last and piece in ranks:
            raise InputError(f"--to gguf: the merges that make {piece!r} do not follow each other. {OTHER_WAY}")
        ranks.setdefault(piece, len(ranks))
        last = piece
    listed = set(merges)
    for piece in vocabulary:
        for at in range(1, len(piece)) if piece not in added and piece not in BYTES else ():
            pair = piece[:at], piece[at:]
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in listed:
                raise InputError(
                    f"--to gguf: {pair[0]!r} and {pair[1]!r} make the token {piece!r}, but this tokenizer does not "
                    f"merge them, and llama.cpp would. {OTHER_WAY}"
                )
    return ranks


def _adds_blank(backend: Mapping[str, Any]) -> bool:
    """Whether a blank is put before a text, and before each text that follows a control token."""
    normalizer, pre = backend.get("normalizer") or {}, backend.get("pre_tokenizer") or {}
    parts = normalizer.get("normalizers", [normalizer])
    if any(part.get("type") == "Prepend" for part in parts):
        return True
    return pre.get("type") == "Metaspace" and pre.get("prepend_scheme") == "always"


def _special_ids(tokenizer: Any, stop_ids: Sequence[int], rows: int) -> dict[str, Value]:
    """Ids of the control tokens that llama.cpp knows by role; of stop tokens the first ones that have a role."""
    ids = {
        name: getattr(tokenizer, f"{long}_token_id", None)
        for name, long in (("bos", "bos"), ("padding", "pad"), ("unknown", "unk"))
    }
    stops = sorted(stop_ids, key=lambda token: token != tokenizer.eos_token_id) or [tokenizer.eos_token_id]
    ids |= dict(zip(STOP_ROLES, stops, strict=False))
    return {
        f"tokenizer.ggml.{name}_token_id": int(token)
        for name, token in ids.items()
        if token is not None and token < rows
    }


def _refuse_equal_texts(texts: Sequence[str]) -> None:
    """llama.cpp ends with an assertion if two tokens have one text."""
    seen: set[str] = set()
    for text in texts:
        if text in seen or not text:
            raise InputError(f"--to gguf: two tokens have the text {text!r}, which llama.cpp refuses. {OTHER_WAY}")
        seen.add(text)
