"""Text -> token ids. Only the template's text can become control tokens, never a record's text."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from qlora.data.types import Ints, RecordError

# Inserted into a control string of a record, one of these splits it into parts that are tokenized separately.
_BREAK_CHARS = [chr(point) for point in range(0xF8F0, 0xF8FF)]


def without_whitespace(text: str) -> str:
    """`text` without whitespace, which templates and tokenizers may change."""
    return "".join(text.split())


class SafeTokenizer:
    """Token ids of text pieces. Control strings are those of the tokenizer's and the template's control tokens."""

    def __init__(self, tokenizer: Any, template_text: str) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        added = {token.content: (i, token.special) for i, token in tokenizer.added_tokens_decoder.items()}
        added = {text: value for text, value in added.items() if len(text.strip()) > 1}  # Gemma's "\n" is ordinary text
        control = {text for text, (_, special) in added.items() if special or text in template_text}
        self.control_pattern = _pattern(control)
        self.special_pattern = _pattern({text for text in control if added[text][1]})
        self._closing_pattern = re.compile(f"(?:{self.control_pattern.pattern})\\s*\\Z")
        self.unknown_id = None if tokenizer.unk_token_id == tokenizer.eos_token_id else tokenizer.unk_token_id
        ids = {added[text][0] for text in control} - {self.unknown_id}  # a record may have unknown characters
        self._is_control = np.zeros(max([len(tokenizer), *(i + 1 for i in ids if i is not None)]), dtype=bool)
        self._is_control[[i for i in ids if i is not None]] = True
        self._cache: dict[str, Ints] = {}
        # Some tokenizers put a space before every text; some control tokens take the white space after them (Phi-3).
        self._adds_space = bool(self._ids("\na") != self._ids("\n") + self._ids("a"))
        self._strips_space = any(token.rstrip for token in tokenizer.added_tokens_decoder.values())
        self.prefix_ids, self.suffix_ids = self._added_ids()
        self.bos, self.bos_id = str(tokenizer.bos_token), tokenizer.bos_token_id
        self.adds_bos = self.bos_id is not None and self.prefix_ids[:1] == [self.bos_id]

    def break_control_strings(
        self, texts: Sequence[str], by_assistant: Sequence[bool]
    ) -> tuple[list[str], str, tuple[str, ...]]:
        """`texts` with every control string broken, the character that breaks them, and the control strings.

        In an assistant's text only special tokens are broken: <think> is part of its answer.
        """
        if not self.control_pattern.search("\n".join(texts)):  # the usual case; special tokens are control tokens
            return list(texts), "", ()
        patterns = [self.special_pattern if flag else self.control_pattern for flag in by_assistant]
        matches = tuple(match for pattern, text in zip(patterns, texts, strict=True) for match in pattern.findall(text))
        if not matches:
            return list(texts), "", ()
        break_char = next((char for char in _BREAK_CHARS if not any(char in text for text in texts)), None)
        if break_char is None:
            raise RecordError("forged control token", "and no private-use character is left to break it with")
        broken = [
            pattern.sub(lambda match: f"{match[0][0]}{break_char}{match[0][1:]}", text)
            for pattern, text in zip(patterns, texts, strict=True)
        ]
        return broken, break_char, matches

    def encode_texts(self, batch: Sequence[tuple[str, str]]) -> list[Ints]:
        """Ids of each text of (text, break character): in one piece, but for the breaks in its control strings."""
        jobs, counts = list[tuple[str, str]](), list[int]()
        for text, break_char in batch:
            if not break_char or break_char not in text:
                jobs.append(("", text))
                counts.append(1)
                continue
            parts = text.split(break_char)
            jobs.extend((self._context(before), part) for before, part in zip(["", *parts], parts, strict=False))
            counts.append(len(parts))
        ids = iter(self._encode_jobs(jobs))
        return [next(ids) if count == 1 else np.concatenate([next(ids) for _ in range(count)]) for count in counts]

    def encode_text(self, text: str, break_char: str) -> Ints:
        """`encode_texts` for one text."""
        cached = self._cache.get(text)
        return self.encode_texts([(text, break_char)])[0] if cached is None else cached

    def encode_after(self, before: str, text: str, break_char: str) -> Ints:
        """Ids of `text`, tokenized apart from the text before it."""
        parts = text.split(break_char) if break_char else [text]
        jobs = [(self._context(last), part) for last, part in zip([before, *parts], parts, strict=False)]
        return np.concatenate(self._encode_jobs(jobs))

    def control_positions(self, ids: Ints) -> list[int]:
        """The indices of the control tokens in `ids`."""
        positions: list[int] = self._is_control[ids].nonzero()[0].tolist()
        return positions

    def starts_with_bos(self, text: str) -> bool:
        """Whether a text starts with the beginning-of-text token's string, if the tokenizer adds one."""
        return self.adds_bos and text.startswith(self.bos)

    def ends_with_special(self, text: str) -> bool:
        """Whether a text ends with the string of a special token."""
        return bool(text) and any(match.end() == len(text) for match in self.special_pattern.finditer(text))

    def as_json(self) -> str:
        """The tokenizer's own JSON: vocabulary, merges, control tokens and all rules."""
        return str(self._backend.to_str())

    def is_control(self, token: int) -> bool:
        """Whether `token` is a control token, which only the template may write."""
        return bool(self._is_control[token])

    def decode(self, batch: Sequence[Ints]) -> list[str]:
        """The text of each array of ids, control tokens included."""
        texts: list[str] = self._backend.decode_batch([ids.tolist() for ids in batch], skip_special_tokens=False)
        return texts

    def normalize(self, text: str) -> str:
        """`text` after the tokenizer's normalizer, to compare with decoded text."""
        normalizer = self._backend.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text)).replace("\u2581", " ")

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _added_ids(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer adds before and after a text."""
        plain = self._ids("a")
        full: list[int] = self._backend.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
        return [], []

    def _context(self, before: str) -> str:
        """The part of the text before a piece that its first token depends on; empty for most tokenizers."""
        if not before or not (self._adds_space or self._strips_space):
            return ""
        closing = self._closing_pattern.search(before)
        if closing:
            return closing[0]
        return "\n" if self._adds_space else ""

    def _encode_jobs(self, jobs: list[tuple[str, str]]) -> list[Ints]:
        """Ids of each text after its context. A job is (context, text)."""
        new = list(dict.fromkeys(context + text for context, text in jobs if context + text not in self._cache))
        encodings = self._backend.encode_batch_fast(new, add_special_tokens=False)
        encoded = {text: np.array(item.ids, dtype=np.int32) for text, item in zip(new, encodings, strict=True)}
        self._cache.update({text: ids for text, ids in encoded.items() if len(text) <= 64 and len(self._cache) < 4096})
        return [self._ids_after(context, text, encoded) for context, text in jobs]

    def _ids_after(self, context: str, text: str, encoded: dict[str, Ints]) -> Ints:
        """The ids of `text` where it follows `context`."""
        ids = encoded.get(context + text)
        if ids is None:
            ids = self._cache[context + text]
        if not context:
            return ids
        if context not in self._cache:
            self._cache[context] = np.array(self._ids(context), dtype=np.int32)
        context_ids = self._cache[context]
        if np.array_equal(ids[: len(context_ids)], context_ids):
            return ids[len(context_ids) :]
        return np.array(self._ids(text), dtype=np.int32)


def _pattern(texts: set[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
