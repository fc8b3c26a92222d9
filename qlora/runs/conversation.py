"""A chat session: the messages so far, and the next answer as a stream of text, by any of the adapters."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora.adapters.switch import AdapterSwitch
from qlora.data.types import Message
from qlora.errors import InputError, QloraError
from qlora.model.generate_tokens import stream_tokens
from qlora.runs.inference_memory import inference_memory
from qlora.runs.load_run import LoadedRun
from qlora.runs.memory_setup import Log
from qlora.utils.atomic_files import write_text

REPLACEMENT = "\ufffd"  # a decoder's output for a character whose bytes are not complete yet


@dataclass
class ChatSession:
    """The messages of a conversation, and the settings of generation. The template is that of training."""

    run: LoadedRun
    switch: AdapterSwitch
    max_new_tokens: int
    temperature: float
    log: Log = lambda line: None
    system: str = ""
    messages: list[Message] = field(default_factory=list)  # user and assistant alternate
    attempts: int = 0  # retries of the last answer: each samples from another seed
    answer_tokens: int = 0  # length of the last answer

    @property
    def seed(self) -> int:
        """The seed of the next answer."""
        return self.run.recipe.train.seed + self.attempts

    def answer(self, text: str) -> Iterator[str]:
        """Add a user message and stream the answer; what was streamed is kept if the answer is interrupted."""
        self.attempts = 0
        return self._answer([*self.messages, Message("user", text)])

    def retry(self) -> Iterator[str]:
        """Replace the last answer by another one. InputError if there is none."""
        prompt = self.prompt_messages()
        self.attempts += 1
        return self._answer(prompt)

    def prompt_messages(self) -> list[Message]:
        """The conversation up to the last user message. InputError for an empty conversation."""
        if not self.messages:
            raise InputError("the conversation is empty. Type a message first.")
        return self.messages[:-1]

    def reset(self) -> None:
        """Clear the conversation; the system prompt stays."""
        self.messages, self.attempts = [], 0

    def answer_once(self, messages: Sequence[Message], base: bool) -> Iterator[str]:
        """An answer by the base model alone or by the active adapter, same seed; the conversation does not change."""
        pieces = self._stream(messages)
        return self._without_adapters(pieces) if base else pieces

    def save(self, file: str) -> int:
        """Append the conversation to a JSONL file as one record to train on; returns the number of its lines."""
        path = Path(file)
        if path.suffix != ".jsonl" or not path.parent.is_dir():
            raise InputError(f"{file or '?'}: name a file that ends in .jsonl, in a folder that exists.")
        if not self.messages:
            raise InputError("the conversation is empty. Type a message first.")
        turns = [{"role": message.role, "content": message.content} for message in self._with_system(self.messages)]
        content = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = [*content.splitlines(), json.dumps({"messages": turns}, ensure_ascii=False)]
        write_text(path, "\n".join(lines) + "\n")
        return len(lines)

    def _answer(self, messages: Sequence[Message]) -> Iterator[str]:
        return self._recorded(messages, self._stream(messages))

    def _recorded(self, messages: Sequence[Message], pieces: Iterator[str]) -> Iterator[str]:
        streamed: list[str] = []
        try:
            for piece in pieces:
                streamed.append(piece)
                yield piece
        finally:
            self.messages = [*messages, Message("assistant", "".join(streamed).strip())]

    def _without_adapters(self, pieces: Iterator[str]) -> Iterator[str]:
        with self.switch.disable():
            yield from pieces

    def _stream(self, messages: Sequence[Message]) -> Iterator[str]:
        prompt, free_tokens = self._prompt(messages)
        limit = min(self.max_new_tokens, free_tokens)
        ids = stream_tokens(self.run.base, prompt, limit, self.temperature, self.seed)
        return decode_stream(self._counted(ids), self.run.base.tokenizer)

    def _counted(self, ids: Iterable[int]) -> Iterator[int]:
        self.answer_tokens = 0
        with inference_memory(self.run.base):
            for token in ids:
                self.answer_tokens += 1
                yield token

    def _prompt(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        """The prompt's ids, and how many tokens may follow; the oldest turns are left out of a full context."""
        config = self.run.base.config.get_text_config()
        context = int(getattr(config, "max_position_embeddings", 0) or 2**31)
        kept = list(messages)
        while True:
            ids = self.run.encoder.prompt_ids(self._with_system(kept))
            if len(ids) < context:
                break
            if len(kept) < 3:
                raise QloraError(
                    f"the prompt has {len(ids):,} tokens, the context {context:,}. Shorten the prompt, or /reset."
                )
            kept = kept[2:]
        if len(kept) < len(messages):
            dropped = len(messages) - len(kept)
            self.log(f"the context of {context:,} tokens is full: the first {dropped} messages are left out")
        return ids, context - len(ids)

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        return [*([Message("system", self.system)] if self.system else []), *messages]


def decode_stream(ids: Iterable[int], tokenizer: Any) -> Iterator[str]:
    """Text as soon as it is complete: without control tokens, leading space or incomplete characters.

    Only the last few ids are decoded again for each new one, so the cost per token does not grow with the answer.
    """
    seen: list[int] = []
    start, end, empty = 0, 0, True
    for token in ids:
        seen.append(token)
        before, after = _decode(seen[start:end], tokenizer), _decode(seen[start:], tokenizer)
        piece = after[len(before) :]
        if empty:
            piece = piece.lstrip()
        if piece and not after.endswith(REPLACEMENT):
            yield piece
            start, end, empty = end, len(seen), False
    rest = _decode(seen[start:], tokenizer)[len(_decode(seen[start:end], tokenizer)) :]
    if rest.strip():
        yield rest.lstrip() if empty else rest


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
