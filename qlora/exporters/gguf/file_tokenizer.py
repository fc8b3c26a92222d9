"""Token ids by what a GGUF file holds, as llama.cpp computes them: to compare a written file with training.

Control tokens are matched first, the longest before others. What lies between is byte-level BPE (`gpt2`) or is joined
by the scores of pieces (`llama`). The module that imports the package `tokenizers`.
"""

import heapq
import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

from qlora.errors import QloraError, first_line
from qlora.exporters.gguf.gguf_file import GgufFile
from qlora.exporters.gguf.split_expressions import DIGITS, rule_named
from qlora.exporters.gguf.vocabulary import CONTROL, NO_MERGES, SPACE, UNKNOWN, USER_DEFINED

ALONE = (CONTROL, USER_DEFINED, UNKNOWN)  # types of tokens that are matched as a whole
RSTRIP_NAMES = ("phi-3", "phi3")  # in general.name: blanks after control tokens are dropped
KEPT_BLANKS = ("<unk>", "<s>", "<|endoftext|>")  # ... but not after these


class FileTokenizer:
    """The tokenizer of a file. QloraError if it is of a kind that is not computed here."""

    def __init__(self, file: GgufFile) -> None:
        def required(key: str) -> Any:
            value = file.get(f"tokenizer.ggml.{key}")
            if value is None:
                raise QloraError(f"{file.path}: tokenizer.ggml.{key} is missing. Export it again.")
            return value

        self.tokens: list[str] = required("tokens")
        types: list[int] = required("token_type")
        self.ids = {text: number for number, text in enumerate(self.tokens)}
        alone = [text for text, kind in zip(self.tokens, types, strict=True) if kind in ALONE]
        self._alone = sorted(alone, key=len, reverse=True)
        strips = any(name in str(file.get("general.name", "")).lower() for name in RSTRIP_NAMES)
        self._rstrip = {*alone, "</s>"} - {*KEPT_BLANKS} if strips else set()
        self.adds_bos = bool(file.get("tokenizer.ggml.add_bos_token", file.get("tokenizer.ggml.model") == "llama"))
        self.bos_id, self.eos_id = (file.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
        if required("model") == "gpt2":
            self._encode_text = _Bytes(file, self.ids).encode
            self._blank = ""
        elif required("model") == "llama":
            self._encode_text = _Pieces(self.ids, required("scores")).encode
            self._blank = " " if file.get("tokenizer.ggml.add_space_prefix", True) else ""
        else:
            raise QloraError(f"{file.path}: a tokenizer of kind {required('model')!r} is not computed here.")

    def text_of(self, token: int | None) -> str:
        """The text of a token; empty for None."""
        return "" if token is None else self.tokens[token]

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of a rendered conversation, as llama.cpp's server takes them: it doubles no BOS of the template."""
        bos = self.text_of(self.bos_id)
        if self.adds_bos and bos and prompt.startswith(bos):
            prompt = prompt[len(bos) :]
        ids = [self.bos_id] if self.adds_bos and self.bos_id is not None else []
        is_after_token = True
        for part, token in self._parts(prompt):
            if token is not None:
                ids.append(token)
            else:
                ids += self._encode_text(self._blank + part if is_after_token else part)
            is_after_token = token is not None
        return ids

    def _parts(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Texts, and the tokens that are matched as a whole between them."""
        parts: list[tuple[str, int | None]] = [(text, None)]
        for token in self._alone:
            if token in text:
                parts = [
                    piece for part in parts for piece in ([part] if part[1] is not None else self._cut(part[0], token))
                ]
        return ((part, token) for part, token in parts if part or token is not None)

    def _cut(self, text: str, token: str) -> Iterator[tuple[str, int | None]]:
        first, *others = text.split(token)
        yield first, None
        for part in others:
            yield token, self.ids[token]
            yield part.lstrip() if token in self._rstrip else part, None


class _Bytes:
    """Byte-level BPE."""

    def __init__(self, file: GgufFile, ids: dict[str, int]) -> None:
        name = str(file.get("tokenizer.ggml.pre", ""))
        rule = rule_named(name)
        if rule is None:
            raise QloraError(f"{file.path}: tokenizer.ggml.pre {name!r} is not computed here.")
        splits: list[Any] = [
            {"type": "Digits", "individual_digits": True}
            if step == DIGITS
            else {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
            for step in rule.steps
        ]
        bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        merges = [text.split(" ", 1) for text in file.get("tokenizer.ggml.merges") or [] if text != NO_MERGES]
        model = {"type": "BPE", "vocab": ids, "merges": merges, "ignore_merges": bool(rule.ignores_merges)}
        try:
            self._tokenizer = Tokenizer.from_str(
                json.dumps(
                    {"model": model, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, bytes_only]}}
                )
            )
        except Exception as error:  # tokenizers raises plain exceptions
            raise QloraError(f"{file.path}: tokenizer.ggml.merges: {first_line(error)}. Export it again.") from error

    def encode(self, text: str) -> list[int]:
        """Ids of a text without control tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


class _Pieces:
    """sentencepiece's BPE: the two neighbors whose joined piece has the best score are joined, the first of equals."""

    def __init__(self, ids: dict[str, int], scores: list[float]) -> None:
        self._ids, self._scores = ids, scores

    def encode(self, text: str) -> list[int]:
        """Ids of a text without control tokens."""
        ids: list[int] = []
        for piece in self._joined(text.replace(" ", SPACE)):
            token = self._ids.get(piece)
            if token is None:
                ids += [self._ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
            else:
                ids.append(token)
        return ids

    def _joined(self, text: str) -> list[str]:
        pieces, after = list(text), [*range(1, len(text)), -1]
        before = list(range(-1, len(text) - 1))
        queue: list[tuple[float, int, int, int]] = []

        def propose(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                joined = pieces[left] + pieces[right]
                token = self._ids.get(joined)
                if token is not None:
                    heapq.heappush(queue, (-self._scores[token], left, right, len(joined)))

        for left in range(len(pieces) - 1):
            propose(left, left + 1)
        while queue:
            _, left, right, size = heapq.heappop(queue)
            if not pieces[left] or not pieces[right] or len(pieces[left]) + len(pieces[right]) != size:
                continue  # one of the two was joined to another meanwhile
            pieces[left] += pieces[right]
            pieces[right] = ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            propose(before[left], left)
            propose(left, after[left])
        return [piece for piece in pieces if piece]
