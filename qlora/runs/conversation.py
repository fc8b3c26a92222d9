"""A conversation with a run: what was said so far, and the next answer word by word, by any of its adapters."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora.adapters.switch import AdapterSwitch
from qlora.model.generate_tokens import stream
from qlora.data.types import Message
from qlora.errors import InputError, QloraError
from qlora.utils.atomic_files import write_text
from qlora.runs.load_run import LoadedRun, Say

BROKEN = "\ufffd"  # what a decoder gives for a character whose bytes are not all there yet


@dataclass
class ChatSession:
    """The messages of a conversation, and how its answers are drawn. The template is that of training."""

    opened: LoadedRun
    switch: AdapterSwitch
    max_new_tokens: int
    temperature: float
    say: Say = lambda line: None
    system: str = ""
    messages: list[Message] = field(default_factory=list)  # user and assistant in turn
    tries: int = 0  # of the last answer: each draws from a seed of its own
    tokens: int = 0  # of the last answer

    @property
    def seed(self) -> int:
        """Where the next answer is drawn from."""
        return self.opened.recipe.train.seed + self.tries

    def ask(self, text: str) -> Iterator[str]:
        """Add what the user says, and give the answer as it comes; what came of it is kept however it ends."""
        self.tries = 0
        return self._answer([*self.messages, Message("user", text)])

    def retry(self) -> Iterator[str]:
        """Take the last answer back and draw another. InputError if there is none."""
        asked = self.question()
        self.tries += 1
        return self._answer(asked)

    def question(self) -> list[Message]:
        """The conversation up to what the user said last. InputError at its beginning."""
        if not self.messages:
            raise InputError("nothing was asked yet.")
        return self.messages[:-1]

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.messages, self.tries = [], 0

    def aside(self, asked: Sequence[Message], base: bool) -> Iterator[str]:
        """An answer of the base alone, or of what acts now, from the same seed; the conversation stays as it is."""
        pieces = self._spoken(asked)
        return self._without_adapters(pieces) if base else pieces

    def save(self, file: str) -> int:
        """Append the conversation to a JSONL file as one training row; returns how many lines it has then."""
        path = Path(file)
        if path.suffix != ".jsonl" or not path.parent.is_dir():
            raise InputError(f"{file or '?'}: name a file that ends in .jsonl, in a folder that exists.")
        if not self.messages:
            raise InputError("nothing was said yet.")
        turns = [{"role": message.role, "content": message.content} for message in self._with_system(self.messages)]
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = [*before.splitlines(), json.dumps({"messages": turns}, ensure_ascii=False)]
        write_text(path, "\n".join(lines) + "\n")
        return len(lines)

    def _answer(self, asked: Sequence[Message]) -> Iterator[str]:
        return self._kept(asked, self._spoken(asked))

    def _kept(self, asked: Sequence[Message], pieces: Iterator[str]) -> Iterator[str]:
        said: list[str] = []
        try:
            for piece in pieces:
                said.append(piece)
                yield piece
        finally:
            self.messages = [*asked, Message("assistant", "".join(said).strip())]

    def _without_adapters(self, pieces: Iterator[str]) -> Iterator[str]:
        with self.switch.off():
            yield from pieces

    def _spoken(self, asked: Sequence[Message]) -> Iterator[str]:
        prompt, room = self._prompt(asked)
        ids = stream(self.opened.base, prompt, min(self.max_new_tokens, room), self.temperature, self.seed)
        return text_of_stream(self._counted(ids), self.opened.base.tokenizer)

    def _counted(self, ids: Iterable[int]) -> Iterator[int]:
        self.tokens = 0
        for token in ids:
            self.tokens += 1
            yield token

    def _prompt(self, asked: Sequence[Message]) -> tuple[list[int], int]:
        """The ids to go on from, and how many may follow; the oldest turns are left out where the model has no room."""
        config = self.opened.base.config.get_text_config()
        room = int(getattr(config, "max_position_embeddings", 0) or 2**31)
        kept = list(asked)
        while True:
            ids = self.opened.encoder.prompt_ids(self._with_system(kept))
            if len(ids) < room:
                break
            if len(kept) < 3:
                raise QloraError(f"{len(ids):,} tokens are more than the model's {room:,}. Say it in fewer words.")
            kept = kept[2:]
        if len(kept) < len(asked):
            self.say(
                f"the model has room for {room:,} tokens: the first {len(asked) - len(kept)} messages are left out"
            )
        return ids, room - len(ids)

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        return [*([Message("system", self.system)] if self.system else []), *messages]


def text_of_stream(ids: Iterable[int], tokenizer: Any) -> Iterator[str]:
    """Pieces of text as soon as they are whole: control tokens left out, no space at the start, no half characters.

    Only the last few ids are decoded again for each new one, so that a long answer costs no more a token.
    """
    seen: list[int] = []
    start, end, silent = 0, 0, True
    for token in ids:
        seen.append(token)
        before, after = _decoded(seen[start:end], tokenizer), _decoded(seen[start:], tokenizer)
        piece = after[len(before) :]
        if silent:
            piece = piece.lstrip()
        if piece and not after.endswith(BROKEN):
            yield piece
            start, end, silent = end, len(seen), False
    rest = _decoded(seen[start:], tokenizer)[len(_decoded(seen[start:end], tokenizer)) :]
    if rest.strip():
        yield rest.lstrip() if silent else rest


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
