"""Text -> token ids, piece by piece: what the template writes may become control tokens, what the data says never."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora.data.types import Ints, RecordError

# Put inside a forged control string, it splits the string into pieces that are tokenised apart.
_BREAKS = [chr(point) for point in range(0xF8F0, 0xF8FF)]


@dataclass(frozen=True, slots=True)
class TextPiece:
    """A stretch of rendered text, and whether its tokens are trained."""

    text: str
    trained: bool = False


class SafeTokenizer:
    """Token ids of pieces, with the control tokens of a tokenizer and a template kept apart from the data's text."""

    def __init__(self, tokenizer: Any, template_text: str) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        added = {token.content: (i, token.special) for i, token in tokenizer.added_tokens_decoder.items()}
        added = {text: value for text, value in added.items() if len(text.strip()) > 1}  # Gemma's "\n" is ordinary text
        control = {text for text, (_, special) in added.items() if special or text in template_text}
        self.control = _pattern(control)
        self.special = _pattern({text for text in control if added[text][1]})
        self._closing = re.compile(f"(?:{self.control.pattern})\\s*\\Z")
        self.unknown_id = None if tokenizer.unk_token_id == tokenizer.eos_token_id else tokenizer.unk_token_id
        ids = {added[text][0] for text in control} - {self.unknown_id}  # unknown characters are no forgery
        self._is_control = np.zeros(max([len(tokenizer), *(i + 1 for i in ids if i is not None)]), dtype=bool)
        self._is_control[[i for i in ids if i is not None]] = True
        self._memo: dict[str, Ints] = {}
        self._anchored = bool(self._ids("\na") != self._ids("\n") + self._ids("a"))  # a space is put before each text
        self.head, self.tail = self._frame(tokenizer)
        self.bos, self.bos_id = str(tokenizer.bos_token), tokenizer.bos_token_id
        self.adds_bos = self.bos_id is not None and self.head[:1] == [self.bos_id]

    def guard(self, texts: Sequence[str], assistant: Sequence[bool]) -> tuple[list[str], str, tuple[str, ...]]:
        """`texts` with every control string in them broken; the character that breaks; what was found.

        In an assistant's own words, control strings that are no special tokens stay: <think> is one of its words.
        """
        patterns = [self.special if mine else self.control for mine in assistant]
        found = tuple(hit for pattern, text in zip(patterns, texts, strict=True) for hit in pattern.findall(text))
        if not found:
            return list(texts), "", ()
        mark = next((mark for mark in _BREAKS if not any(mark in text for text in texts)), None)
        if mark is None:
            raise RecordError("forged control token", "and every private-use character that could break it up")
        broken = [p.sub(lambda hit: _break(hit[0], mark), text) for p, text in zip(patterns, texts, strict=True)]
        return broken, mark, found

    def encode(self, rows: Sequence[tuple[Sequence[TextPiece], str]]) -> "list[list[Ints] | RecordError]":
        """Ids of each row's pieces; a row is (pieces, breaking character). RowError where the data forged a token."""
        jobs, shape = list[tuple[str, str]](), list[list[int]]()
        for pieces, mark in rows:
            shape.append([])
            before = ""
            for piece in pieces:
                parts = piece.text.split(mark) if mark else [piece.text]
                jobs.extend((self._anchor(last), part) for last, part in zip([before, *parts], parts, strict=False))
                shape[-1].append(len(parts))
                before = piece.text or before
        flat = iter(self._encode_all(jobs))
        return [
            self._honest([np.concatenate([next(flat) for _ in range(n)]) for n in counts], pieces, mark)
            for counts, (pieces, mark) in zip(shape, rows, strict=True)
        ]

    def as_json(self) -> str:
        """The tokenizer in its own words: vocabulary, merges, control tokens and every rule."""
        return str(self._backend.to_str())

    def is_control(self, token: int) -> bool:
        """Whether `token` is one that only the template may write."""
        return bool(self._is_control[token])

    def decode(self, rows: Sequence[Ints]) -> list[str]:
        """The text of each row of ids, control tokens written out."""
        texts: list[str] = self._backend.decode_batch([row.tolist() for row in rows], skip_special_tokens=False)
        return texts

    def normalised(self, text: str) -> str:
        """`text` as the tokenizer's own normaliser leaves it, for comparing with what decoding gives."""
        normaliser = self._backend.normalizer
        return text if normaliser is None else str(normaliser.normalize_str(text)).replace("\u2581", " ")

    def _honest(self, ids: list[Ints], pieces: Sequence[TextPiece], mark: str) -> "list[Ints] | RecordError":
        """`ids` if the template's control strings are the only ones that became control tokens."""
        written = sum(len(self.control.findall(piece.text)) for piece in pieces)
        made = int(self._is_control[np.concatenate(ids)].sum()) if ids else 0
        if made > written:
            return RecordError("forged control token", f"{made - written} made from ordinary text by the tokenizer")
        return ids

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _frame(self, tokenizer: Any) -> tuple[list[int], list[int]]:
        """The ids this tokenizer puts before and after a text of its own accord."""
        bare = self._ids("a")
        full: list[int] = self._backend.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        return [], []

    def _anchor(self, before: str) -> str:
        """What stands before a piece, as far as it decides how the piece begins; nothing for most tokenizers."""
        if not self._anchored or not before:
            return ""
        closing = self._closing.search(before)
        return closing[0] if closing else "\n"

    def _encode_all(self, jobs: list[tuple[str, str]]) -> list[Ints]:
        new = list(dict.fromkeys(anchor + text for anchor, text in jobs if anchor + text not in self._memo))
        encoded = self._backend.encode_batch_fast(new, add_special_tokens=False)
        made = {text: np.array(one.ids, dtype=np.int32) for text, one in zip(new, encoded, strict=True)}
        self._memo.update({text: ids for text, ids in made.items() if len(text) <= 64 and len(self._memo) < 4096})
        return [self._after(anchor, text, made) for anchor, text in jobs]

    def _after(self, anchor: str, text: str, made: dict[str, Ints]) -> Ints:
        """The ids of `text` where it follows `anchor`."""
        whole = made.get(anchor + text)
        if whole is None:
            whole = self._memo[anchor + text]
        if not anchor:
            return whole
        if anchor not in self._memo:
            self._memo[anchor] = np.array(self._ids(anchor), dtype=np.int32)
        first = self._memo[anchor]
        if np.array_equal(whole[: len(first)], first):
            return whole[len(first) :]
        return np.array(self._ids(text), dtype=np.int32)


def _break(hit: str, mark: str) -> str:
    return f"{hit[0]}{mark}{hit[1:]}"


def _pattern(texts: set[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
